"""Sinks: where a run's numbers, pictures and texts are shown; TensorBoard, Weights & Biases, MLflow.

A service is a class with the methods of `Sink` and an entry of `SINKS`. All get the same names
(`scalars.py`).
"""

import html
import importlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, ClassVar, Protocol, Self

from millrace.engine.config import Config
from millrace.engine.run_log.side_channels import SideChannels
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import write_atomically

Rows = Sequence[tuple[int, dict[str, float]]]
"""Numbers by name, of steps in order."""


@dataclass(frozen=True)
class Opening:
    """What a sink is opened for.

    Attributes:
        output: folder of the run.
        step: steps done before. A sink goes on with the run that it knows by the folder; at 0 it begins one.
    """

    config: Config
    output: Path
    step: int


class Sink(Protocol):
    """A place that shows a run. Any error is a warning, and training goes on."""

    NAME: ClassVar[str]
    """For people."""
    SETTING: ClassVar[str]
    """Key of the section `logging` that asks for it."""
    PACKAGE: ClassVar[str]
    """Is imported only where it is asked for."""
    REMOTE: ClassVar[bool]
    """Whether a method may wait for a network; then another thread calls all of them, in order."""

    @classmethod
    def open(cls, opening: Opening) -> Self:
        """Begin a run or go on with it."""

    def scalars(self, rows: Rows) -> None:
        """Show numbers of steps."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """Show a PNG file."""

    def text(self, name: str, text: str, step: int) -> None:
        """Show a text, JSON for example."""

    def close(self, failed: bool) -> None:
        """Nothing follows, the run or its stage has ended, maybe by an error; wait until all is written."""


class TensorBoard:
    """Events in `tensorboard/` in the run's folder."""

    NAME, SETTING, PACKAGE, REMOTE = "TensorBoard", "tensorboard", "tensorboard", False

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    @classmethod
    def open(cls, opening: Opening) -> Self:
        """Later steps of existing events are dropped, they will be made again."""
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        from torch.utils.tensorboard import SummaryWriter

        return cls(SummaryWriter(str(opening.output / "tensorboard"), purge_step=opening.step + 1))

    def scalars(self, rows: Rows) -> None:
        """One chart a name."""
        for step, values in rows:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Decoded: events hold pixels."""
        import numpy as np
        from PIL import Image

        self._writer.add_image(name, np.asarray(Image.open(path)), step, dataformats="HWC")

    def text(self, name: str, text: str, step: int) -> None:
        """As a block of code: TensorBoard reads Markdown, where four blanks make one."""
        self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), step)

    def close(self, failed: bool) -> None:
        """Flush."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose own process sends what it is given."""

    NAME, SETTING, PACKAGE, REMOTE = "Weights & Biases", "wandb", "wandb", False
    ID_FILE = "wandb_id"
    """In the run's folder: the id under which resuming and later stages go on."""

    def __init__(self, run: Any) -> None:
        self._run = run

    @classmethod
    def open(cls, opening: Opening) -> Self:
        """The id is made here and kept before the service knows of it."""
        import wandb

        path = opening.output / cls.ID_FILE
        if (known := _kept(path, opening.step)) is None:
            known = secrets.token_hex(8)
            _keep(path, known)
        run = wandb.init(
            project=opening.config.logging.project,
            dir=str(opening.output),
            name=opening.output.name,
            config=opening.config.model_dump(mode="json"),
            id=known,
            resume="allow",
        )
        return cls(run)

    def scalars(self, rows: Rows) -> None:
        """One row of its history a step."""
        for step, values in rows:
            self._run.log(values, step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """As a file."""
        import wandb

        self._run.log({name: wandb.Image(str(path))}, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """With the next row: one of a resumed run's own step would be refused."""
        import wandb

        self._run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>")}, commit=False)

    def close(self, failed: bool) -> None:
        """Wait until all is sent."""
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow, through its client: nothing of the process-wide state of its other interface."""

    NAME, SETTING, PACKAGE, REMOTE = "MLflow", "mlflow", "mlflow", True
    ID_FILE = "mlflow_id"
    """In the run's folder: the id that MLflow gave the run."""
    METRICS, PARAMS = 1000, 100
    """The most that a server takes in one request."""
    VALUE = 500
    """Letters of a parameter that every version of a server takes."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._id = client, run_id

    @classmethod
    def open(cls, opening: Opening) -> Self:
        """Settings become parameters of a new run. They cannot be changed afterwards: stages have texts."""
        import mlflow
        from mlflow.entities import Param

        client = mlflow.MlflowClient(tracking_uri=opening.config.logging.mlflow)
        path = opening.output / cls.ID_FILE
        if (known := _kept(path, opening.step)) is not None:
            client.update_run(known, status="RUNNING")
            return cls(client, known)
        project = opening.config.logging.project
        experiment = client.get_experiment_by_name(project)
        number = client.create_experiment(project) if experiment is None else experiment.experiment_id
        found = client.create_run(number, run_name=opening.output.name).info.run_id
        _keep(path, found)
        settings = _flat(opening.config.model_dump(mode="json"))
        for some in _batches([Param(key, value[: cls.VALUE]) for key, value in settings], cls.PARAMS):
            client.log_batch(found, params=some)
        return cls(client, found)

    def scalars(self, rows: Rows) -> None:
        """In as few requests as the server allows."""
        from mlflow.entities import Metric

        now = int(time.time() * 1e3)
        metrics = [Metric(name, value, now, step) for step, values in rows for name, value in values.items()]
        for some in _batches(metrics, self.METRICS):
            self._client.log_batch(self._id, metrics=some)

    def picture(self, name: str, path: Path, step: int) -> None:
        """As one of a series, through which MLflow's page has a slider."""
        from PIL import Image

        with Image.open(path) as image:
            self._client.log_image(self._id, image, key=name, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """As an artifact."""
        self._client.log_text(self._id, text, f"{name}/step-{step:08d}.txt")

    def close(self, failed: bool) -> None:
        """Say how it has ended."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


SINKS: tuple[type[Sink], ...] = (TensorBoard, WeightsAndBiases, MLflow)


class Sinks:
    """The sinks that a configuration asks for. What fails in one is counted and said, and ends nothing.

    Raises UserError for a package that is not installed.
    """

    def __init__(self, opening: Opening, channels: SideChannels) -> None:
        wanted = [kind for kind in SINKS if getattr(opening.config.logging, kind.SETTING)]
        for kind in wanted:
            try:
                importlib.import_module(kind.PACKAGE)
            except ImportError:
                raise UserError(
                    f"logging.{kind.SETTING} needs {kind.NAME}: pip install {kind.PACKAGE}"
                ) from None
        self._open = [_Opened(kind, opening, channels) for kind in wanted]
        self.text("config", opening.config.model_dump_json(indent=2), opening.step)

    def scalars(self, rows: Rows) -> None:
        """Show numbers of steps."""
        self._tell(lambda sink: sink.scalars(rows))

    def picture(self, name: str, path: Path, step: int) -> None:
        """Show a PNG file, which stays."""
        self._tell(lambda sink: sink.picture(name, path, step))

    def text(self, name: str, text: str, step: int) -> None:
        """Show a text."""
        self._tell(lambda sink: sink.text(name, text, step))

    def close(self) -> None:
        """Nothing follows. While an error is on its way, the run has failed."""
        failed = sys.exception() is not None
        self._tell(lambda sink: sink.close(failed))
        for opened in self._open:
            opened.wait()

    def _tell(self, what: Callable[[Sink], None]) -> None:
        for opened in self._open:
            opened.tell(what)


class _Opened:
    """One sink, and where it is remote the thread that calls it: training does not wait for a network."""

    PATIENCE = 60.0
    """Seconds that the end of a run waits for a remote sink."""
    BEHIND = 10_000
    """Calls that may wait; more are dropped and counted."""

    def __init__(self, kind: type[Sink], opening: Opening, channels: SideChannels) -> None:
        self._kind, self._channels = kind, channels
        self._sink: Sink | None = None
        self._calls: SimpleQueue[Callable[[Sink], None] | None] | None = None
        if not kind.REMOTE:
            self._start(opening)
            return
        self._calls = SimpleQueue()
        self._thread = Thread(target=self._serve, args=(opening,), daemon=True, name=kind.NAME)
        self._thread.start()

    def tell(self, what: Callable[[Sink], None]) -> None:
        """Call the sink, now or soon; not one that could not be opened."""
        if self._calls is None:
            self._call(what)
            return
        with self._channels.tolerate(self._kind.NAME):
            if self._calls.qsize() >= self.BEHIND:
                raise TimeoutError(f"{self.BEHIND} calls wait for an answer")
            self._calls.put(what)

    def wait(self) -> None:
        """Until everything was told."""
        if self._calls is not None:
            self._calls.put(None)
            self._thread.join(self.PATIENCE)
            with self._channels.tolerate(self._kind.NAME):
                if self._thread.is_alive():
                    raise TimeoutError(f"no answer in {self.PATIENCE:.0f} s; what it was not told is lost")

    def _start(self, opening: Opening) -> None:
        with self._channels.tolerate(self._kind.NAME):
            self._sink = self._kind.open(opening)

    def _call(self, what: Callable[[Sink], None]) -> None:
        if self._sink is not None:
            with self._channels.tolerate(self._kind.NAME):
                what(self._sink)

    def _serve(self, opening: Opening) -> None:
        assert self._calls is not None
        self._start(opening)
        while (what := self._calls.get()) is not None:
            self._call(what)


def _kept(path: Path, step: int) -> str | None:
    """The id of the service's run; none where a run begins."""
    with suppress(OSError):
        if step and (known := path.read_text().strip()):
            return known
    return None


def _keep(path: Path, known: str) -> None:
    with suppress(OSError):  # the next start will be a run of its own
        write_atomically(path, known + "\n")


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """At most `size` of them together."""
    return (items[i : i + size] for i in range(0, len(items), size))


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of nested settings."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)
