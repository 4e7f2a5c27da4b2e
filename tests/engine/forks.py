"""Processes that need not import: a server that has imported the engine forks a child for each call.

A child is as good as new: it has no process group and no threads, its own session, files and environment.
"""

import gc
import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.programs import ROOT, environment

IMPORTED = (
    "deepspeed",
    "tests.engine.jobs",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "diffusers.models.autoencoders.autoencoder_kl",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers",
    "transformers.models.dinov3_vit.modeling_dinov3_vit",
    "transformers.models.t5gemma.modeling_t5gemma",
)
"""What runs import, where it is installed; none of it starts a thread."""


class Child:
    """A process that runs one function."""

    def __init__(self, connection: Connection, pid: int, folder: Path) -> None:
        self._connection, self.pid, self._folder = connection, pid, folder

    def poll(self) -> int | None:
        """Its exit code, negative for the signal that ended it; None while it runs."""
        self._connection.send(("poll", self.pid))
        return self._connection.recv()

    def kill(self) -> None:
        """kill -9 for the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def text(self, stream: str) -> str:
        """What it wrote to `out` or `err`."""
        path = self._folder / stream
        return path.read_text() if path.exists() else ""  # it may have been ended before it began

    def result(self) -> Any:
        """What its function returned."""
        return pickle.loads((self._folder / "result").read_bytes())


def wait_for(children: list[Child], timeout: float = 1000) -> list[int]:
    """Exit codes of the ranks of a job. Once one has failed, or after `timeout` seconds, all are killed."""
    deadline = time.monotonic() + timeout
    while None in (codes := [child.poll() for child in children]):
        if any(codes) or time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.01)
    return codes


class ForkServer:
    """Starts children; it starts itself with the first one."""

    def __init__(self) -> None:
        self._server: subprocess.Popen | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="forks-")
        self._count = 0

    def start(self, function: Callable, *arguments: Any, cwd: Path = ROOT, **variables: str) -> Child:
        """Call a function, found by its module and name, with `variables` in the environment."""
        if self._server is None:
            ours, theirs = socket.socketpair()
            code = f"import sys; sys.path[0] = {str(ROOT)!r}; from tests.engine import forks; "
            self._server = subprocess.Popen(
                [sys.executable, "-c", f"{code} forks.serve({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                env=environment() | {"DS_ACCELERATOR": "cpu"},  # DeepSpeed chooses at import
            )
            theirs.close()
            self._connection = Connection(ours.detach())
        self._count += 1
        folder = Path(self._folder.name) / str(self._count)
        folder.mkdir()
        request = (function, arguments, environment() | variables, str(cwd), str(folder))
        self._connection.send(("start", request))
        return Child(self._connection, self._connection.recv(), folder)

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._connection.close()
            self._server.wait()
        self._folder.cleanup()


def serve(descriptor: int) -> None:
    """Fork for every request that comes over a socket, until it closes."""
    connection, children = Connection(descriptor), {}
    fork = multiprocessing.get_context("fork")
    for module in IMPORTED:
        with suppress(ImportError):
            import_module(module)
    import_module("deepspeed.ops").__compatible_ops__  # noqa: B018 - looked up once, by running a compiler
    gc.collect()
    gc.freeze()  # so that the collections of a child do not walk, and copy, what was imported
    with suppress(EOFError):
        while True:
            what, request = connection.recv()
            if what == "start":
                child = fork.Process(target=_run, args=(connection, *request))
                child.start()
                children[child.pid] = child
                connection.send(child.pid)
            else:
                connection.send(children[request].exitcode)


def _run(
    connection: Connection, function: Callable, arguments: tuple, variables: dict, cwd: str, folder: str
) -> None:
    """The child: call the function as a process of its own."""
    connection.close()
    os.setsid()
    for descriptor, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{stream}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    result = function(*arguments)
    Path(folder, "result").write_bytes(pickle.dumps(result))


def run_script(path: Path, arguments: list[str]) -> None:
    """What `python path arguments` does."""
    sys.argv = [str(path), *arguments]
    sys.path[0] = str(path.parent)
    runpy.run_path(str(path), run_name="__main__")


def run_train_until(step: int, number: int, path: Path, arguments: list[str]) -> None:
    """`run_script` of train.py, in a process that receives a signal when this step is logged: from outside,
    but at a moment that does not depend on the machine's speed."""
    from millrace.engine.trainer import Trainer

    record = Trainer._record

    def watched(trainer: Trainer, *numbers: Any) -> None:
        record(trainer, *numbers)
        if trainer.step == step:
            os.kill(os.getpid(), number)

    Trainer._record = watched
    run_script(path, arguments)
