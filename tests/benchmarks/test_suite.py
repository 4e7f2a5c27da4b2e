"""The throughput suite: its cases, what they amount to, what fails, and the whole of it on small models."""

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from millrace.benchmarks import throughput
from millrace.benchmarks.report import suite_report as report
from millrace.benchmarks.step import frozen_networks as frozen
from millrace.benchmarks.step import peer_steps as peers
from millrace.benchmarks.step import sample_pictures as pictures
from millrace.benchmarks.step import step_measurement as measurement
from millrace.benchmarks.step import suite
from millrace.benchmarks.step import training_steps as steps
from millrace.engine.config import Autoencoder
from millrace.engine.config.loading import load_config
from millrace.engine.config.smoke import smoke
from millrace.engine.encoders.autoencoder import autoencoder_entry
from millrace.engine.encoders.teacher import vision_entry
from millrace.engine.encoders.text_encoders.t5gemma import T5Gemma
from millrace.engine.util.errors import UserError
from tests.programs import environment

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
CPU = torch.device("cpu")


ROWS = report.post_rows()
NAMES = [row["config"] for row in ROWS]


def test_the_rows_are_those_of_the_post_with_a_speed():
    assert len(NAMES) == 12
    methods = [(row["method"], row["resolution"], row["batches_per_second"]) for row in ROWS]
    assert ("REPA-Dinov3", 256, 3.46) in methods
    assert ("REPA-E-VAE", 256, 3.39) in methods
    assert methods[-3:] == [("Baseline", 1024, 1.33), ("TREAD", 1024, 1.64), ("SPRINT", 1024, 1.89)]
    assert {row["baseline"] for row in ROWS} == {"latent_256", "jit_1024"}


def test_every_row_is_measured_with_all_inputs_and_the_most_telling_come_first():
    cases = suite.all_cases(("cached", "live"))
    names = [case.name for case in cases]
    assert len(names) == len(set(names))
    autoencoders = {("latent_256_flux2", "cached"), ("latent_256_repa_e", "cached")}
    assert {(name, kind) for name in NAMES for kind in ("cached", "live")} - autoencoders == {
        (case.config, case.conditioning) for case in cases if not case.peer
    }
    assert names[:4] == [
        f"{name}/cached" for name in ("latent_256", "jit_1024", "jit_1024_tread", "jit_1024_sprint")
    ]
    first_live = names.index("latent_256/live")
    assert names.index("jit_1024/diffusers, FSDP2") < first_live
    assert all("/live" not in name for name in names[:first_live])


def test_the_posts_own_inputs_come_first_where_they_are_asked_for():
    names = [case.name for case in suite.all_cases(("pictures", "cached", "live"))]
    assert len(names) == len(set(names))
    first = (
        "latent_256",
        "jit_1024",
        "jit_1024_tread",
        "jit_1024_sprint",
        "latent_256_tread",
        "latent_256_sprint",
    )
    assert names[: len(first)] == [f"{name}/pictures" for name in first]
    assert names.index("latent_256/cached") < names.index("latent_256/diffusers")
    assert "latent_256_flux2/pictures" in names
    assert "latent_256_flux2/live" in names
    assert "latent_256_flux2/cached" not in names


def test_a_case_that_is_none_is_refused():
    cases = suite.all_cases(("cached",))
    assert suite.choose(cases, ["jit_1024/cached"]) == [suite.Case("jit_1024", "cached")]
    with pytest.raises(UserError, match="'latent_256/live' is not in the suite"):
        suite.choose(cases, ["latent_256/live"])


def case(name, kind="cached", images=100.0, flops=4.0, teacher=0.0, **changes):
    """A measured case."""
    row = {
        "case": f"{name}/{kind}",
        "status": "measured",
        "config": name,
        "conditioning": kind,
        "includes": "what it takes",
        "images_per_second": 8 * images,
        "images_per_second_per_device": images,
        "batches_per_second": 8 * images / 256,
        "model_flops_per_image": flops,
        "frozen_flops_per_image": {"teacher": teacher, "autoencoder": 0.0, "text": 0.0},
        "mfu": 0.4,
        "mfu_with_frozen": 0.5,
        "micro_batch": 32,
        "global_batch": 256,
        "step_seconds_median": 0.1,
        "peak_memory_bytes": 2**30,
        "overrides": [],
        "skipped_steps": 0,
        "seconds": 1.0,
    }
    return row | changes


def result(cases):
    """A run with these cases."""
    return {
        "cases": cases,
        "table": report.derive(cases),
        "smoke": False,
    }


def test_figures_are_arithmetic_on_the_cases():
    cases = [
        case("jit_1024", images=100.0, flops=4.0),
        case("jit_1024_tread", images=125.0, flops=2.0),
        case("latent_256", images=400.0, flops=1.0),
        case("latent_256_repa_dinov3", images=320.0, flops=1.0, teacher=0.25, micro_batch=16),
    ]
    rows = {row["config"]: row for row in report.derive(cases)}
    assert list(rows) == NAMES
    tread = rows["jit_1024_tread"]
    assert tread["cached"]["relative"] == pytest.approx(1.25)
    assert tread["cached"]["ideal"] == pytest.approx(2.0)
    # A fifth of the time is saved, with half of the FLOPs.
    assert tread["cached"]["saved_time_per_saved_flops"] == pytest.approx(0.2 / 0.5)
    assert tread["post"]["relative"] == pytest.approx(1.64 / 1.33)
    ratio = tread["post"]["flop_ratio"]
    assert ratio == pytest.approx(0.658, abs=0.001), "as counted by hand for full captions"
    assert tread["post"]["saved_time_per_saved_flops"] == pytest.approx((1 - 1.33 / 1.64) / (1 - ratio))
    aligned = rows["latent_256_repa_dinov3"]["cached"]
    assert (aligned["relative"], aligned["ideal"]) == pytest.approx((0.8, 0.8))
    assert aligned["saved_time_per_saved_flops"] is None, "nothing is saved"
    assert not aligned["same_micro_batch"]
    assert rows["latent_256_tread"]["cached"] is None


def test_the_text_has_all_rows_peers_and_failures():
    cases = [
        case("latent_256"),
        case("latent_256_repa_dinov2", micro_batch=16),
        case("latent_256", images=50.0, peer="diffusers, FSDP2"),
        suite.without(suite.Case("latent_256_sprint", "cached"), "failed", "RuntimeError: no"),
    ]
    text = report.text(result(cases))
    speeds, relatives, beside, failures, notes = text.split("\n\n")
    assert [line.split()[0] for line in speeds.splitlines()[2:]] == [row["method"] for row in ROWS]
    assert len(relatives.splitlines()) == 14
    assert "1.00~" in relatives, "another micro-batch than the baseline's"
    assert beside.splitlines()[2].split()[-1] == "2.00", "ours to the peer"
    assert failures == "latent_256_sprint/cached: failed: RuntimeError: no"
    assert "derived: measured images/s over 256" in notes


def test_the_dense_baselines_are_measured_in_fp8_too():
    cases = [case for case in suite.all_cases(("cached", "live")) if case.fp8]
    assert {(case.config, case.fp8) for case in cases} == {
        (name, backend) for name in ("latent_256", "jit_1024") for backend in suite.FP8_BACKENDS
    }
    assert cases[0].name == "latent_256/cached, FP8 torch"
    names = [case.name for case in suite.all_cases(("cached",))]
    assert names.index("jit_1024_sprint/cached") < names.index("latent_256/cached, FP8 torch")
    assert names.index("jit_1024/cached, FP8 transformer_engine") < names.index("latent_256/diffusers")


def test_fp8_stands_beside_bf16_and_in_no_row_of_the_post():
    fp8 = {"fp8": "torch", "overrides": ["precision.fp8.backend=torch"]}
    cases = [
        case("jit_1024", images=100.0),
        case("jit_1024", images=130.0, **fp8),
        case("latent_256", images=50.0, **fp8, micro_batch=16),
        suite.without(suite.Case("jit_1024", "cached", None, "torchao"), "left out", "not installed"),
    ]
    rows = {row["config"]: row for row in report.derive(cases)}
    assert rows["jit_1024"]["cached"]["images_per_second_per_device"] == 100.0
    assert rows["latent_256"]["cached"] is None
    fast, alone = report.fp8_table(cases).rows
    assert (fast[0], fast[1], fast[-1]) == ("jit_1024", "torch", "1.30")
    assert alone[-1] == "-"
    assert not report.fp8_table(cases[:1]).rows
    text = report.text(result(cases))
    assert "to BF16" in text
    assert "jit_1024/cached, FP8 torchao: left out: not installed" in text
    assert "overridden" not in text, "what makes the case is no override of the run"
    smaller = [case("jit_1024"), case("jit_1024", **fp8, micro_batch=16)]
    assert report.fp8_table(smaller).rows[0][-1] == "1.00~"


def test_an_fp8_case_is_the_configuration_with_the_backend(monkeypatch, tmp_path):
    seen = []

    def measure(path, what, conditioning, arguments):
        seen.append((what.config.precision.fp8.backend, arguments.overrides))
        return case("jit_1024")

    monkeypatch.setattr(measurement, "measure", measure)
    chosen = ["jit_1024/cached", "jit_1024/cached, FP8 torch", "jit_1024/cached, FP8 transformer_engine"]
    run = suite.Run(given(case=chosen), None, tmp_path)
    run.run()
    hash_tower = "conditioning.text.kind=hash"
    assert seen == [("none", [hash_tower]), ("torch", [hash_tower, "precision.fp8.backend=torch"])]
    plain, fp8, other = run.result["cases"]
    assert (plain["fp8"], fp8["fp8"], other["status"]) == (None, "torch", "left out")
    assert other["reason"].startswith("transformer_engine ")


def given(**changes):
    """Arguments of the command."""
    values = {
        "suite": "post",
        "conditioning": ["cached"],
        "case": ["jit_1024/cached", "jit_1024_tread/cached"],
        "continue_file": False,
        "smoke": True,
        "seconds": None,
        "until": None,
        "overrides": ["conditioning.text.kind=hash"],
        "accumulate": False,
        "warmup": 1,
        "steps": 1,
        "text_tokens": None,
        "profile": None,
    }
    return argparse.Namespace(**values | changes)


def test_a_case_that_fails_is_recorded_and_the_others_go_on(monkeypatch, tmp_path):
    def measure(path, config, conditioning, arguments):
        if "tread" not in path:
            raise RuntimeError("CUDA error: it broke\nmore")
        return case("jit_1024_tread")

    monkeypatch.setattr(measurement, "measure", measure)
    run = suite.Run(given(), tmp_path / "out.json", tmp_path)
    run.run()
    failed, good = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert (failed["status"], failed["reason"]) == ("failed", "RuntimeError: CUDA error: it broke")
    assert good["status"] == "measured"

    # Where another process watches, it goes on in a fresh one, with the cases that have no row.
    (tmp_path / "out.json").unlink()
    watched = given(continue_file=True)
    with pytest.raises(SystemExit) as leaving:
        suite.Run(watched, tmp_path / "out.json", tmp_path).run()
    assert leaving.value.code == suite.RESTART
    suite.Run(watched, tmp_path / "out.json", tmp_path).run()
    statuses = [row["status"] for row in json.loads((tmp_path / "out.json").read_text())["cases"]]
    assert statuses == ["failed", "measured"]


def test_no_case_begins_that_may_end_too_late(monkeypatch, tmp_path):
    monkeypatch.setattr(measurement, "measure", lambda *_: case("jit_1024"))
    run = suite.Run(given(until=0.0), None, tmp_path)
    run.run()
    assert {row["reason"] for row in run.result["cases"]} == {"no time left (--seconds)"}


CHILD = """
import json, os, signal, sys
from pathlib import Path
path = Path(sys.argv[1])
result = json.loads(path.read_text())
if not result["cases"]:
    result["running"] = "latent_256/cached"
    path.write_text(json.dumps(result))
    os.kill(os.getpid(), signal.SIGKILL)
result["cases"].append({"case": "latent_256_tread/cached", "status": "left out", "reason": "-",
                        "config": "latent_256_tread", "conditioning": "cached", "peer": None, "seconds": 0.0})
path.write_text(json.dumps(result))
"""


def test_a_process_that_dies_costs_one_case(tmp_path):
    output = tmp_path / "out.json"
    output.write_text(json.dumps({"running": None, "cases": [], "table": []}))
    suite.watch([sys.executable, "-c", CHILD, str(output)], output, None)
    died, after = json.loads(output.read_text())["cases"]
    assert (died["case"], died["status"]) == ("latent_256/cached", "failed")
    assert "SIGKILL" in died["reason"]
    assert after["case"] == "latent_256_tread/cached"


def test_a_process_that_cannot_begin_is_an_error(tmp_path):
    with pytest.raises(UserError, match="exit code 3"):
        suite.watch([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "out.json", None)


def test_a_micro_batch_that_does_not_fit_is_halved():
    config = load_config(ROOT / "configs" / "latent_256.json")
    config = measurement.of_one_micro_batch(config, 32)
    tried = []

    def call(fitting):
        tried.append((fitting.data.micro_batch, fitting.data.global_batch))
        if fitting.data.micro_batch > 8:
            raise torch.OutOfMemoryError("no")
        return {"micro_batch": fitting.data.micro_batch}

    assert measurement.halving(config, call) == {"micro_batch": 8}
    assert tried == [(32, 32), (16, 16), (8, 8)]


def test_options_that_do_not_go_together(monkeypatch):
    for arguments, problem in (
        (["--suite", "post", "--config", "a.json"], "has its own configurations"),
        (["--seconds", "5"], "--seconds belongs to --suite"),
        (["--suite", "post", "--watch"], "needs --output"),
    ):
        monkeypatch.setattr(sys, "argv", ["throughput.py", *arguments])
        with pytest.raises(UserError, match=problem):
            throughput.parse()


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def test_frozen_networks_have_the_published_sizes():
    """Built on meta tensors: parameters of the published weights, in millions."""
    meta = torch.device("meta")
    config = load_config(ROOT / "configs" / "latent_256.json")
    for kind, millions in (("flux1", 84), ("flux2", 84)):
        network = frozen.open_autoencoder(Autoencoder(kind=kind), meta).network
        assert parameters(network) / 1e6 == pytest.approx(millions, abs=1), kind
    for kind, millions in (("dinov2", 304), ("dinov3", 303)):
        entry = vision_entry(kind)
        with torch.device("meta"):
            network = entry.new_network(entry.large.shape)
        assert parameters(network) / 1e6 == pytest.approx(millions, abs=1.5), kind
    tower = frozen.open_text_encoder(config.conditioning.text, 2304, meta, torch.bfloat16)
    assert tower.dim == 2304
    # 26 layers of four attention matrices and a gated MLP, and 256,000 embeddings.
    layer = 2304 * 256 * (8 + 4 + 4 + 8) + 3 * 2304 * 9216
    assert parameters(tower.network) == pytest.approx(26 * layer + 256000 * 2304, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "channels", "factor"),
    [("latent_256", 16, 8), ("latent_256_flux2", 32, 8), ("latent_256_repa_e", 16, 8)],
)
def test_random_autoencoders_give_latents_of_the_published_shape(monkeypatch, name, channels, factor):
    config = load_config(ROOT / "configs" / f"{name}.json").conditioning.autoencoder
    entry = autoencoder_entry(config.kind)
    shape = entry.network.shape | {"block_out_channels": (32,) * 4, "layers_per_block": 1}
    narrow = replace(entry, network=replace(entry.network, shape=shape))
    module = importlib.import_module(f"millrace.engine.encoders.autoencoders.{config.kind}")
    monkeypatch.setattr(module, "ENTRY", narrow)
    autoencoder = frozen.open_autoencoder(config, CPU)
    latents = autoencoder.encode(torch.zeros(2, 3, 64, 32))
    assert latents.shape == (2, channels, 64 // factor, 32 // factor)
    assert latents.isfinite().all()
    assert (autoencoder.channels, autoencoder.factor, autoencoder.stochastic) == (channels, factor, True)


def test_frozen_networks_cost_what_was_counted_by_hand():
    """TFLOP of a picture of 256 pixels and of a caption of 256 tokens, on meta tensors."""
    meta = torch.device("meta")
    config = load_config(ROOT / "configs" / "latent_256_repa_dinov3.json")
    pictures = torch.empty(1, 3, 256, 256, device=meta)
    encoder = frozen.open_autoencoder(config.conditioning.autoencoder, meta)
    dinov3 = vision_entry("dinov3")
    with meta:
        teacher = dinov3.new_network(dinov3.large.shape)
    tower = frozen.open_text_encoder(config.conditioning.text, 2304, meta, torch.bfloat16)
    ids = torch.zeros(1, 256, dtype=torch.int64)
    for call, wanted in (
        (lambda: encoder.network.encode(pictures.bfloat16()), 0.27),
        (lambda: teacher(pictures), 0.164),
        (lambda: tower._forward(ids, torch.tensor([256])), 1.05),
    ):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() / 1e12 == pytest.approx(wanted, rel=0.05)


def test_frozen_networks_run_and_do_not_disturb_random_numbers(monkeypatch):
    config = load_config(ROOT / "configs" / "latent_256_repa_dinov3.json")
    before = torch.random.get_rng_state()
    small = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    small |= {"sliding_window": 256}
    monkeypatch.setattr(T5Gemma, "shape", small)
    tower = frozen.open_text_encoder(config.conditioning.text, 32, CPU, torch.float32)
    packed = tower.encode(["two words", ""])
    assert packed.cu_seqlens.tolist() == [0, 4, 5], "two, wo|rds and an end; an end alone"
    assert packed.embeddings.isfinite().all()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_sample_pictures_are_a_folder_that_trains(tmp_path):
    folder = pictures.write(tmp_path / "p", max_tokens=64, count=3, edge=40)
    source = importlib.import_module("millrace.engine.data.sources.folder").FolderSource(folder)
    assert len(source) == 3
    assert source.image(0).size == (40, 40)
    tokenizer = frozen.PieceTokenizer(100)
    lengths = [len(ids) for ids in tokenizer([source.captions(i).long for i in range(3)])["input_ids"]]
    for length, wanted in zip(lengths, (16, 32, 48), strict=True):
        assert wanted - 5 <= length <= wanted


def test_an_expanded_mask_changes_nothing_but_its_size(monkeypatch, tmp_path):
    overrides = [f"run.output_dir={tmp_path}", "conditioning.text.kind=hash"]
    config = smoke(load_config(ROOT / "configs" / "jit_1024.json", overrides), overrides)
    batch = steps.random_batch(config, 2, (8, 8), 6, [6, 3], CPU)
    forward = steps.PeerStep(peers.build(config, CPU), config, batch).forward
    transformer = importlib.import_module("diffusers.models.transformers.transformer_prx")
    attend, shapes = transformer.dispatch_attention_fn, []

    def noting(query, key, value, attn_mask, **options):
        shapes.append(tuple(attn_mask.shape))
        return attend(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(transformer, "dispatch_attention_fn", noting)
    plain = forward().item()
    with peers.expanded_mask():
        assert forward().item() == pytest.approx(plain, rel=1e-5)
    depth, heads = config.model.depth, config.model.heads
    assert shapes == [(2, 1, 1, 70)] * depth + [(2, heads, 64, 70)] * depth


@pytest.mark.slow
def test_the_whole_suite_on_small_models(tmp_path):
    """All rows, all kinds of inputs and all peers, in a process that another watches; with profiles."""
    output = tmp_path / "out.json"
    command = [sys.executable, BENCHMARKS / "throughput.py", "--suite", "post", "--smoke", "--steps", "1"]
    command += ["--watch", "--output", output, "--set", "data.workers=0"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(output.read_text())
    assert content["benchmark"] == "suite"
    assert content["running"] is None
    rows = content["cases"]
    assert [row["case"] for row in rows] == [
        case.name for case in suite.all_cases(("pictures", "cached", "live"))
    ]
    left_out = [row["case"] for row in rows if row["status"] != "measured"]
    optional = {"torchao"} if importlib.util.find_spec("torchao") is None else set()
    assert left_out == [
        case.name
        for case in suite.all_cases(("pictures", "cached", "live"))
        if case.fp8 in {"transformer_engine", *optional}
    ], [row.get("reason") for row in rows]
    assert "to BF16" in done.stdout
    found = {
        (row["config"], row["conditioning"]): row
        for row in rows
        if not row.get("peer") and not row.get("fp8")
    }
    for row in found.values():
        ran = {name for name, flops in row["frozen_flops_per_image"].items() if flops}
        wanted = {"teacher"} if "repa" in row["config"] else set()
        if row["conditioning"] != "cached":
            wanted |= set() if row["config"].startswith("jit") else {"autoencoder"}
        if row["conditioning"] == "live":
            wanted |= {"text"}
        assert ran == wanted, row["case"]
        assert row["batches_per_second"] == pytest.approx(row["images_per_second"] / 256)
    for entry in content["table"]:
        assert entry["pictures"]["relative"] > 0
        assert entry["live"]["relative"] > 0
        assert (entry["cached"] is None) == (entry["method"] in ("Flux2-AE", "REPA-E-VAE"))
        routed = entry["method"] in ("TREAD", "SPRINT")
        assert (entry["pictures"]["saved_time_per_saved_flops"] is not None) == routed
    assert done.stdout.count("REPA-Dinov3") == 2
    assert "diffusers, FSDP2" in done.stdout
