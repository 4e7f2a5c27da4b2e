"""TensorBoard, Weights & Biases and MLflow: the same names, one run of the service for a run, failures told.

The last two are stand-ins of the interface that is used, with the limits of MLflow's server.
"""

import json
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from millrace.engine.run_log.logs import RunLog
from millrace.engine.run_log.scalars import memory_scalars, step_scalars
from millrace.engine.run_log.sinks import MLflow, TensorBoard, _Opened
from millrace.engine.util.errors import UserError

RECORD = {
    "samples_seen": 16,
    "lr": 1e-3,
    "grad_norm": 1.0,
    "applied": True,
    "step_seconds": 0.1,
    "images_per_second": 80.0,
    "stage": "first",
    "parts": {"cats": 12, "dogs": 4},
    "loss": 0.5,
    "losses": {"flow": 0.4, "repa": 0.1},
    "loss_by_time": [0.1, None, 0.3, 0.4],
    "autoencoder": {"gan": 2.0},
    "captions_cut": 0,
}
NAMES = {
    "train/samples_seen": 16,
    "train/lr": 1e-3,
    "train/grad_norm": 1.0,
    "train/applied": True,
    "train/parts/cats": 12,
    "train/parts/dogs": 4,
    "train/loss": 0.5,
    "train/captions_cut": 0,
    "speed/step_seconds": 0.1,
    "speed/images_per_second": 80.0,
    "loss/flow": 0.4,
    "loss/repa": 0.1,
    "loss/autoencoder/gan": 2.0,
    "loss_by_time/0.125": 0.1,
    "loss_by_time/0.625": 0.3,
    "loss_by_time/0.875": 0.4,
}


class FakeMLflow:
    """What of MLflow's client is used; what a server refuses is an error."""

    def __init__(self, broken=False):
        self.experiments, self.runs, self.uris, self.threads, self.broken = {}, {}, [], set(), broken

    def install(self, monkeypatch):
        module, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
        module.MlflowClient = lambda tracking_uri: self.uris.append(tracking_uri) or self
        entities.Metric = lambda key, value, timestamp, step: (key, value, step)
        entities.Param = lambda key, value: (key, value)
        monkeypatch.setitem(sys.modules, "mlflow", module)
        monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
        return self

    def get_experiment_by_name(self, name):
        if self.broken:
            raise ConnectionError("no answer")
        number = self.experiments.get(name)
        return None if number is None else SimpleNamespace(experiment_id=number)

    def create_experiment(self, name):
        assert name not in self.experiments
        return self.experiments.setdefault(name, str(len(self.experiments)))

    def create_run(self, experiment_id, run_name):
        run_id = f"{run_name}-{len(self.runs)}"
        self.runs[run_id] = SimpleNamespace(
            experiment=experiment_id, status="RUNNING", metrics=[], params={}, texts={}, pictures=[]
        )
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def update_run(self, run_id, status):
        self.runs[run_id].status = status

    set_terminated = update_run

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(metrics) <= 1000
        assert len(params) <= 100
        self.threads.add(threading.current_thread().name)
        for key, value in params:
            assert self.runs[run_id].params.setdefault(key, value) == value
            assert isinstance(value, str)
            assert len(value) <= 500
        self.runs[run_id].metrics += metrics

    def log_text(self, run_id, text, artifact_file):
        self.runs[run_id].texts[artifact_file] = text

    def log_image(self, run_id, image, *, key, step):
        self.runs[run_id].pictures.append((key, step, image.size))


class FakeWandb(ModuleType):
    """What of Weights & Biases is used."""

    def __init__(self, monkeypatch):
        super().__init__("wandb")
        self.opened, self.rows, self.ended = [], [], []
        self.Image, self.Html = (lambda path: ("image", path)), (lambda text: ("html", text))
        monkeypatch.setitem(sys.modules, "wandb", self)

    def init(self, **arguments):
        self.opened.append(arguments)
        return self

    def log(self, values, step=None, commit=True):
        assert commit or step is None
        self.rows.append((step, values))

    def finish(self, exit_code):
        self.ended.append(exit_code)


def told(log, step=2):
    """Tell a log of a step, a grid and both kinds of measurements."""
    log.records([{"step": step, **RECORD}])
    log.evaluation(step, {"fid": 3.5, "samples": 8, "weights": "ema"})
    log.validation({"step": step, "weights": "ema", "loss": 0.25, "by_time": [0.2, 0.3]}, (0.25, 0.75))


MEASURED = {
    "metrics/fid": 3.5,
    "metrics/samples": 8,
    "validation/ema_loss": 0.25,
    "validation/ema_loss_by_time/0.250": 0.2,
    "validation/ema_loss_by_time/0.750": 0.3,
}


def test_names():
    assert step_scalars({"step": 2, **RECORD}) == NAMES
    assert 0.01 < memory_scalars()["memory/host_gb"] < 1000


def test_tensorboard_has_all_of_it_and_the_configuration(runs, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = runs.config(tmp_path, {"logging": {"tensorboard": True}})
    log = RunLog(config, tmp_path, 0)
    told(log)
    Image.new("RGB", (6, 4)).save(tmp_path / "grid.png")
    log.grid(tmp_path / "grid.png", 2)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = set(events.Tags()["scalars"])
    assert names - NAMES.keys() - MEASURED.keys() == {"memory/host_gb"}
    for name, value in {**NAMES, **MEASURED}.items():
        (event,) = events.Scalars(name)
        assert (event.step, event.value) == (2, pytest.approx(float(value)))
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (2, 6, 4)
    (text,) = events.Tensors("config/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert json.loads(shown) == config.model_dump(mode="json")
    assert all(line.startswith("    ") for line in shown.splitlines())  # a block of code in Markdown


def test_weights_and_biases_has_the_same_names(runs, tmp_path, monkeypatch):
    service = FakeWandb(monkeypatch)
    log = RunLog(runs.config(tmp_path, {"logging": {"wandb": True, "project": "p"}}), tmp_path, 0)
    told(log)
    log.grid(tmp_path / "g.png", 2)
    log.close()
    (opened,) = service.opened
    assert (opened["project"], opened["name"], opened["resume"]) == ("p", tmp_path.name, "allow")
    (_, text), *rows, (_, picture) = service.rows
    assert text["config"][1].startswith("<pre>{")
    assert {step for step, _ in rows} == {2}
    values = {name: value for _, row in rows for name, value in row.items()}
    values.pop("memory/host_gb")
    assert values == NAMES | MEASURED
    assert picture == {"samples": ("image", str(tmp_path / "g.png"))}
    assert service.ended == [0]


def test_mlflow_has_the_same_names_and_goes_on_with_its_run(runs, tmp_path, monkeypatch):
    service = FakeMLflow().install(monkeypatch)
    config = runs.config(tmp_path, {"logging": {"mlflow": "http://host:5000", "project": "p"}})
    log = RunLog(config, tmp_path, 0)
    told(log)
    Image.new("RGB", (6, 4)).save(tmp_path / "grid.png")
    log.grid(tmp_path / "grid.png", 2)
    log.close()
    resumed = RunLog(
        config.model_copy(update={"run": config.run.model_copy(update={"steps": 9})}), tmp_path, 2
    )
    resumed.records([{"step": 3, **RECORD}])
    with pytest.raises(RuntimeError):  # noqa: PT012
        try:
            raise RuntimeError("a run that fails")
        finally:
            resumed.close()
    ((number, run),) = service.runs.items()
    assert number == (tmp_path / MLflow.ID_FILE).read_text().strip()
    assert (set(service.uris), service.experiments) == ({"http://host:5000"}, {"p": "0"})
    assert {(key, value) for key, value, step in run.metrics if step == 2 and "memory" not in key} == {
        *NAMES.items(),
        *MEASURED.items(),
    }
    assert {step for *_, step in run.metrics} == {2, 3}
    assert run.pictures == [("samples", 2, (6, 4))]
    assert run.params["run.steps"] == "6"  # which a server does not let change; the texts have the rest
    assert [json.loads(run.texts[f"config/step-{step:08d}.txt"])["run"]["steps"] for step in (0, 2)] == [6, 9]
    assert run.status == "FAILED"
    assert service.threads == {"MLflow"}  # no step waits for the network
    assert resumed.channels.summary() == log.channels.summary() == []


def test_a_run_that_begins_is_another_one(runs, tmp_path, monkeypatch):
    service = FakeMLflow().install(monkeypatch)
    for _ in range(2):
        RunLog(runs.config(tmp_path, {"logging": {"mlflow": "sqlite:///x"}}), tmp_path, 0).close()
    assert [run.status for run in service.runs.values()] == ["FINISHED"] * 2


def test_a_service_that_is_away_is_a_warning(runs, tmp_path, monkeypatch, capsys):
    FakeMLflow(broken=True).install(monkeypatch)
    log = RunLog(runs.config(tmp_path, {"logging": {"mlflow": "http://host:5000"}}), tmp_path, 0)
    told(log)
    log.close()
    assert "warning: MLflow failed: ConnectionError: no answer; training goes on" in capsys.readouterr().err
    assert log.channels.failures == {"MLflow": 1}  # one that is not open is not called


def test_a_service_that_hangs_holds_nobody_up(runs, tmp_path, monkeypatch):
    hangs = threading.Event()
    monkeypatch.setattr(MLflow, "open", lambda _: hangs.wait())
    monkeypatch.setattr(_Opened, "PATIENCE", 0.05)
    monkeypatch.setattr(_Opened, "BEHIND", 3)
    FakeMLflow().install(monkeypatch)
    log = RunLog(runs.config(tmp_path, {"logging": {"mlflow": "http://host:5000"}}), tmp_path, 0)
    told(log)  # the configuration and two of these wait
    log.close()
    hangs.set()
    assert log.channels.failures == {"MLflow": 3}  # a record, the end, and the wait for it


@pytest.mark.parametrize(("key", "value", "name"), [("wandb", True, "wandb"), ("mlflow", "x", "mlflow")])
def test_a_package_that_is_missing(runs, tmp_path, monkeypatch, key, value, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"^logging\.{key} needs .*: pip install {name}$"):
        RunLog(runs.config(tmp_path, {"logging": {key: value}}), tmp_path, 0)


def test_one_sink_fails_and_the_others_go_on(runs, tmp_path, monkeypatch):
    service = FakeWandb(monkeypatch)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoard, "scalars", fail)
    changes = {"logging": {"tensorboard": True, "wandb": True}}
    log = RunLog(runs.config(tmp_path, changes), tmp_path, 0)
    told(log)
    log.close()
    assert log.channels.failures == {"TensorBoard": 3}
    assert len(service.rows) == 4


def test_a_password_does_not_get_into_the_configuration(runs, tmp_path):
    with pytest.raises(
        UserError, match=r"logging\.mlflow.*has a password.*MLFLOW_TRACKING_PASSWORD"
    ) as caught:
        runs.config(tmp_path, {"logging": {"mlflow": "https://me:secret@host"}})
    assert "secret" not in str(caught.value)
    assert runs.config(tmp_path, {"logging": {"mlflow": "https://me@host"}}).logging.mlflow
