"""Model card: README.md of an export, as the hub shows it.

It says what was trained on what and for how long, how it did, how to load it, and whose licences hold for
what is in the folder. All of it is read from the checkpoint and its run's log; only the licence is asked for.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.config import Config
from millrace.engine.config.data import Data
from millrace.engine.publishing.pipeline_folder import Component, Components
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import write_atomically
from millrace.engine.util.hub import is_hub_name

CARD = "README.md"
SAMPLES = "samples.png"
_LICENCES = {
    "google/t5gemma-2b-2b-ul2": "Gemma Terms of Use",
    "Qwen/Qwen3-VL-Embedding-2B": "Apache 2.0",
    "black-forest-labs/FLUX.1-dev": "FLUX.1 [dev] Non-Commercial License",
}
"""Of the published weights, where they are known here."""
_SECTIONS = ("model", "routing", "objective", "alignment", "optimizer", "schedule", "ema", "precision")
"""Settings that a card shows where they are not the defaults; no folders of whoever trained."""


def write_card(
    folder: Path,
    name: str,
    config: Config,
    reader: CheckpointReader,
    origin: str,
    use: str,
    licence: str | None = None,
    frozen: Sequence[Component] = (),
    components: Components = "copy",
) -> None:
    """Write the card of an export, and the run's newest sample grid beside it. Raises UserError.

    Args:
        folder: of the export.
        name: of the model, for people.
        config, reader: of the checkpoint.
        origin: as `describe_checkpoint` has it.
        use: Python that loads and samples it.
        licence: as the hub spells it; None where nobody said.
        frozen, components: as `save_pipeline` returned and took them.
    """
    run = reader.folder.parent.parent
    parts = [
        _front_matter(config, licence),
        f"# {name}",
        _summary(config, reader),
        f"## Use\n\n```python\n{use.strip()}\n```",
        _samples(folder, run, reader.step, config),
        _training(config, reader, origin),
        _metrics(run, reader.step),
        _networks(frozen, components),
        _rights(licence, frozen),
    ]
    try:
        write_atomically(folder / CARD, "\n\n".join(part for part in parts if part) + "\n")
    except OSError as error:
        raise UserError(f"{folder / CARD}: cannot be written: {error}") from None


def pipeline_use(name: str, kind: str, config: Config, frozen: Sequence[Component], dtype: str) -> str:
    """Python that loads a pipeline of class `kind` from `name` and makes a picture, all of it in `dtype`: the
    networks are stored as the run computed them, which may differ. `frozen` are those that are not in it."""
    sampling, edge = config.sampling, config.data.resolution
    imports = {"diffusers", "torch", *(each.loading.partition(".")[0] for each in frozen)}
    given = "".join(f"\n    {each.name}={each.loading}," for each in frozen)
    call = [
        '"a photograph of a fox in the snow"',
        f"height={edge}",
        f"width={edge}",
        f"num_inference_steps={sampling.steps}",
        f"guidance_scale={sampling.guidance if sampling.guided else 1.0}",
        "use_resolution_binning=False",
        "generator=torch.Generator().manual_seed(0)",
    ]
    if kind == "PRXPipeline" and config.conditioning.text.kind != "t5gemma":
        call.append("skip_text_cleaning=True")
    lines = [f"import {module}" for module in sorted(imports)]
    lines += ["", f"pipeline = diffusers.{kind}.from_pretrained(", f'    "{name}",{given}']
    # Modules that are handed over stay as they are, so they are cast afterwards.
    lines += [f"    torch_dtype=torch.{dtype},", f").to(torch.{dtype})" if frozen else ")"]
    lines += ["picture = pipeline(", *(f"    {argument}," for argument in call), ").images[0]"]
    lines += ['picture.save("fox.png")']
    return "\n".join(lines)


def transformer_use(name: str) -> str:
    """Python that loads a transformer folder."""
    return f'import diffusers\n\ntransformer = diffusers.PRXTransformer2DModel.from_pretrained("{name}")'


def adapter_use(name: str, base: str, kind: str, dtype: str) -> str:
    """Python that puts an adapter from `name` on the model that it was trained over, in `dtype`.

    `kind` is the class of the pipeline, where `base` is the folder of one.
    """
    whole = (Path(base) / "transformer").is_dir()
    model, kind = ("base.transformer", kind) if whole else ("base", "PRXTransformer2DModel")
    lines = ["import diffusers", "import peft", "import torch", ""]
    lines.append(f'base = diffusers.{kind}.from_pretrained("{base}", torch_dtype=torch.{dtype})')
    return "\n".join([*lines, f'peft.PeftModel.from_pretrained({model}, "{name}")  # changes it in place'])


def _front_matter(config: Config, licence: str | None) -> str:
    lines = ["---", "library_name: diffusers", "pipeline_tag: text-to-image"]
    lines.append(f"license: {licence or 'unknown'}")
    base = config.run.init_from
    if base is not None and is_hub_name(base) and not Path(base).exists():
        lines.append(f"base_model: {base.partition('@')[0]}")
    return "\n".join([*lines, "tags:", "- prx", "- millrace", "---"])


def _summary(config: Config, reader: CheckpointReader) -> str:
    kind, model = config.conditioning.autoencoder.kind, config.model
    space = "pixels" if kind == "pixels" else f"the latents of {kind}"
    return (
        f"A PRX flow transformer of width {model.width} and depth {model.depth} that makes pictures from "
        f"captions. It predicts the {config.objective.prediction} on {space} and was trained at "
        f"{config.data.resolution} px with Millrace {reader.written_by}."
    )


def _samples(folder: Path, run: Path, step: int, config: Config) -> str:
    grids = sorted((run / "samples").glob("step-*.png"))
    grids = [grid for grid in grids if int(grid.stem.removeprefix("step-")) <= step]
    if not grids:
        return ""
    shutil.copyfile(grids[-1], folder / SAMPLES)
    prompts = run / "samples" / "prompts.txt"
    captions = prompts.read_text().splitlines() if prompts.is_file() else []
    shown = int(grids[-1].stem.removeprefix("step-"))
    text = (
        f"## Samples\n\nAt step {shown}, {config.sampling.steps} steps of {config.sampling.solver}, guidance "
        f"{config.sampling.guidance:g}.\n\n![samples]({SAMPLES})"
    )
    return text + "".join(f"\n{i}. {caption}" for i, caption in enumerate(["", *captions]) if i)


def _training(config: Config, reader: CheckpointReader, origin: str) -> str:
    rows = {
        "weights": origin,
        "data": _data(config.data),
        "pictures seen": f"{reader.meta['samples']:,}",
        "steps": f"{reader.step:,} of {config.run.steps:,}, {config.data.global_batch} pictures each",
        "started from": config.run.init_from or "random weights",
        "text encoder": config.conditioning.text.kind,
        "captions dropped": f"{config.conditioning.caption_drop:g}",
        "time shift, noise scale": f"{config.objective.time_shift:g}, {config.objective.noise_scale}",
        "optimizer": f"{config.optimizer.kind}, lr {config.optimizer.lr:g}, {config.schedule.kind}",
        "token routing": config.routing.policy,
        "precision": f"{config.precision.compute}, masters in {config.precision.master}",
        "seed": str(config.run.seed),
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
    values = config.model_dump(mode="json", include=set(_SECTIONS), exclude_defaults=True)
    settings = json.dumps(_without_folders(values), indent=2)
    details = f"Settings that are not Millrace's defaults:\n\n```json\n{settings}\n```"
    return f"## Training\n\n{table}\n\n{details}"


def _data(data: Data) -> str:
    """Sources by the names of their folders, without where they are on the machine that trained."""
    parts = data.mixture or (data,)
    return ", ".join(f"{part.source} {Path(part.path).name if part.path else ''}".strip() for part in parts)


def _without_folders(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_folders(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in ("path", "cache", "mean_target")
    }


def _metrics(run: Path, step: int) -> str:
    """The last loss and the last evaluation that the log has up to `step`."""
    try:
        lines = (run / "log.jsonl").read_text().splitlines()
    except OSError:
        return ""
    loss, scores = "", ""
    for line in lines:
        record = json.loads(line)
        if record.get("step", step + 1) > step:
            continue
        if "loss" in record:
            loss = f"| loss | {record['loss']:.4f} | {record['step']:,} |"
        if "evaluation" in record:
            numbers = {k: v for k, v in record["evaluation"].items() if isinstance(v, int | float)}
            scores = "\n".join(
                f"| {key} | {value:.5g} | {record['step']:,} |" for key, value in numbers.items()
            )
    rows = [part for part in (loss, scores) if part]
    return "\n".join(["## Metrics\n", "| | | at step |", "|---|---|---|", *rows]) if rows else ""


def _networks(frozen: Sequence[Component], components: Components) -> str:
    if not frozen:
        return ""
    how = "copied into this folder" if components == "copy" else "not in this folder; `Use` loads them"
    rows = [f"| {each.name} | {each.source} | {licence_of(each.source)} |" for each in frozen]
    return "\n".join(
        [f"## Frozen networks\n\nThey are {how}.\n", "| | from | licence |", "|---|---|---|", *rows]
    )


def _rights(licence: str | None, frozen: Sequence[Component]) -> str:
    own = f"The transformer: {licence}." if licence else "The transformer: nobody has said yet."
    rest = (
        " The frozen networks keep their own licences, and so does whoever passes them on." if frozen else ""
    )
    return f"## Licence\n\n{own}{rest}"


def licence_of(source: str) -> str:
    """Of a frozen network: what its own card says, or what is known of it here."""
    try:
        lines = (Path(source) / CARD).read_text().split("---")[1].splitlines()
        own = [line.partition(":")[2].strip() for line in lines if line.startswith("license:")]
    except (OSError, IndexError, UnicodeDecodeError):
        own = []
    if own:
        return own[0]
    hub = is_hub_name(source) and not Path(source).exists()
    where = f"see https://huggingface.co/{source}" if hub else "not known here"
    return _LICENCES.get(source, where)
