"""What holds for every test: one thread, fixed seeds, poisoned memory, and no CUDA test without CUDA."""

import gc
import os
import random
import signal
import sys

import numpy as np
import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS reads it when it starts


def pytest_configure(config: pytest.Config) -> None:
    """Tiny tensors gain nothing from threads; more of them only make runs on a shared machine slow.

    In the environment as well: a Trainer without the variable takes the threads it finds, for this process
    and for all tests after it, and the bits of a sum follow the number of threads.
    """
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    # Here, because the process that hands tests to workers loads no conftest.py further down.
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.kernels import memory_watch

        config.pluginmanager.register(memory_watch)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `cuda` where there is no device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _repeatable():
    """Same random numbers in any order of tests, and NaN in memory that was never written.

    PyTorch fills uninitialised memory only while deterministic algorithms are asked for, so a kernel that
    leaves a part of its output unwritten cannot pass on leftovers of an earlier call.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    assert torch.get_num_threads() == threads, "the test leaves another number of threads to those after it"


@pytest.fixture(scope="module", autouse=True)
def _process_as_before():
    """A Trainer joins a job, handles signals and freezes the garbage collector; DeepSpeed's stage 3 replaces
    `F.linear` for good. Undo that."""
    environment, linear = dict(os.environ), torch.nn.functional.linear
    heard = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM)
    handlers = {number: signal.getsignal(number) for number in heard}
    yield
    torch.nn.functional.linear = linear
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    gc.unfreeze()


@pytest.fixture
def liger():
    """The operations of liger-kernel, where it is installed."""
    return pytest.importorskip("liger_kernel.ops", reason="liger-kernel is not installed")


@pytest.fixture
def interpreted_liger(liger, monkeypatch):
    """Gives liger-kernel's kernels what the interpreter lacks: a device's rsqrt and tanh, and arguments that
    are numbers as tensors, as compiled code has them."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1")
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(argument):
        if type(argument) is float:
            return tl.tensor(
                interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32
            )
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    modules = {name: sys.modules[f"liger_kernel.ops.{name}"] for name in ("rms_norm", "geglu")}
    monkeypatch.setattr(modules["rms_norm"], "rsqrt", lambda x: tl.rsqrt(x))
    monkeypatch.setattr(modules["geglu"], "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)
