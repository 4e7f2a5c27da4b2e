"""Caches of a data set of shards: what the frozen networks make of its samples, written once for all runs.

    captions ──clean, unique in the shard──▶ text tower ──▶ valid rows, bf16 or int8 with a scale
    pictures ──evaluation view of the bucket──▶ autoencoder ──▶ mean and log-variance

`cache_job.py` divides the shards over processes and resumes; `engine/data/latent_cache.py` has the
format.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from millrace.engine.config import Config
from millrace.engine.data import UnreadablePicture, signed_unit
from millrace.engine.data.crop import crop_box, cut
from millrace.engine.data.latent_cache import (
    Kind,
    TensorFile,
    quantise,
)
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.distributed.precision_audit import DTYPES
from millrace.engine.distributed.process_group import choose_device
from millrace.engine.encoders.autoencoder import open_autoencoder
from millrace.engine.encoders.cache_job import (
    CacheJob,
    Maker,
)
from millrace.engine.encoders.frozen_networks import constants_tensors
from millrace.engine.encoders.identity import (
    autoencoder_identity,
    text_identity,
)
from millrace.engine.encoders.text_encoder import open_text_tower
from millrace.engine.util.errors import UserError
from millrace.kernels.support.packed import to_device

TextDtype = Literal["bf16", "int8"]
KINDS: tuple[Kind, ...] = ("text", "latents")
_STORED = {"bf16": "bfloat16", "int8": "int8"}
_CAPTIONS = 64
"""Captions in one pass of the text tower."""


def cache_kinds(text: str) -> tuple[Kind, ...]:
    """The kinds in `text,latents`, as given on the command line. Raises UserError."""
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        wrong = (unknown or ["nothing"])[0]
        raise UserError(f"--cache {text}: {wrong!r} is no cache; give text, latents or both")
    return kinds


def write_caches(
    dataset: str | Path,
    config: Config,
    kinds: Sequence[Kind],
    rank: int = 0,
    world_size: int = 1,
    *,
    text_dtype: TextDtype = "bf16",
    replace: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write the caches of a data set with the networks of `config.conditioning`, those that are not there.

    Args:
        dataset: folder of shards.
        config: gives the networks, `precision.compute` (of the text tower), `run.device`, `data.micro_batch`
            (pictures in one pass of the autoencoder), `data.workers` and `data.upscale`.
        kinds: "text", "latents" or both.
        rank, world_size: this process takes the shards rank, rank + world_size, ...
        text_dtype: of the stored rows.
        replace: make those again that another network made; otherwise they are refused.
        say: prints a line.

    Raises UserError for data sets, networks or settings that cannot be used.
    """
    source = ShardsSource(dataset)
    device = choose_device(config.run.device)
    for kind in kinds:
        if kind == "text":
            maker: Maker = _Text(source, config, device, text_dtype)
        else:
            maker = _Latents(source, config, device)
        CacheJob(source, maker, rank, world_size, replace, say).run()


class _Text(Maker):
    kind: Kind = "text"
    first = "rows"

    def __init__(self, source: ShardsSource, config: Config, device: torch.device, dtype: TextDtype) -> None:
        text, dim = config.conditioning.text, config.model.context_dim
        compute = DTYPES[config.precision.compute]
        super().__init__(source, text_identity(text, dim, compute))
        self.dtype = _STORED[dtype]
        self._tower = _Later(lambda: open_text_tower(text, dim, device, compute))

    def common(self) -> bytes:
        ((rows, was_cut),) = self._tower().rows([""])
        return save({"rows": rows.cpu().contiguous(), "cut": torch.tensor([was_cut], dtype=torch.uint8)})

    def shard(self, samples: range, bucket: tuple[int, int], file: TensorFile) -> None:
        tower = self._tower()
        places: dict[str, int] = {}
        which: dict[str, list[int]] = {"long": [], "short": []}
        for i in samples:
            try:
                captions = self.source.captions(i)
            except UnreadablePicture as problem:
                self.unreadable.append(str(problem))
                which["long"].append(-1)
                which["short"].append(-1)
                continue
            for name, indices in which.items():
                caption = tower.clean(getattr(captions, name))
                indices.append(places.setdefault(caption, len(places)))
        # Captions of about one length go through together, so that little is computed on padding.
        order = sorted(places, key=lambda caption: (len(caption), places[caption]))
        lengths, scales, cuts = [0], [], []
        for first in range(0, len(order), _CAPTIONS):
            found = tower.rows(order[first : first + _CAPTIONS])
            lengths += [len(rows) for rows, _ in found]
            cuts += [was_cut for _, was_cut in found]
            rows = torch.cat([rows for rows, _ in found])
            if self.dtype == "int8":
                rows, scale = quantise(rows)
                scales.append(scale.cpu())
                if not bool(scales[-1].isfinite().all()):
                    raise UserError(
                        f"shard of samples {samples[0]} to {samples[-1]}: the text tower gives numbers "
                        "that are not finite; keep them as they are with --text-dtype bf16"
                    )
            else:
                rows = rows.bfloat16()
            file.append(rows)
        if not order:
            file.append(torch.empty(0, self.network["dim"], dtype=getattr(torch, self.dtype)))
        place = {places[caption]: i for i, caption in enumerate(order)} | {-1: -1}
        tensors = {name: torch.tensor([place[i] for i in indices]) for name, indices in which.items()}
        tensors["offsets"] = torch.tensor(lengths).cumsum(0)
        tensors["cut"] = torch.tensor(cuts, dtype=torch.uint8)
        if self.dtype == "int8":
            tensors["scale"] = torch.cat([torch.empty(0), *scales])
        file.finish(tensors)


class _Latents(Maker):
    kind: Kind = "latents"
    first = "moments"

    def __init__(self, source: ShardsSource, config: Config, device: torch.device) -> None:
        section = config.conditioning.autoencoder
        if section.kind == "pixels" or section.tuning.enabled:
            reason = (
                "pixels has no latents" if section.kind == "pixels" else "it is tuned, so they would change"
            )
            raise UserError(f"--cache latents: conditioning.autoencoder: {reason}; cache text alone")
        super().__init__(source, autoencoder_identity(section))
        self.dtype = self.network["dtype"]
        self._config, self._device = config.data, device
        self._autoencoder = _Later(lambda: open_autoencoder(section, device))

    def common(self) -> bytes:
        tensors, numbers = constants_tensors(self._autoencoder().constants)
        return save({name: x.cpu().contiguous() for name, x in tensors.items()}, metadata=numbers)

    def shard(self, samples: range, bucket: tuple[int, int], file: TensorFile) -> None:
        autoencoder, batch = self._autoencoder(), self._config.micro_batch
        present: list[bool] = []
        with ThreadPoolExecutor(max(1, self._config.workers)) as threads:

            def views(first: int) -> list[Future[Tensor | None]]:
                part = samples[first : first + batch]
                return [threads.submit(self._view, i, bucket) for i in part]

            ahead = views(0)
            for first in range(0, len(samples), batch):
                pictures, ahead = [future.result() for future in ahead], views(first + batch)
                present += [picture is not None for picture in pictures]
                # Nobody reads what stands for a picture that could not be read.
                blank = torch.zeros(3, *bucket, dtype=torch.uint8)
                stack = torch.stack([blank if picture is None else picture for picture in pictures])
                found = autoencoder.posterior(signed_unit(to_device(stack, self._device)))
                file.append(torch.stack([x for x in found if x is not None], dim=1))
        file.finish({"present": torch.tensor(present, dtype=torch.uint8)})

    def _view(self, i: int, bucket: tuple[int, int]) -> Tensor | None:
        """The largest centred crop of a picture at the bucket's size, (3, h, w) uint8."""
        try:
            image, key = self.source.image(i), self.source.key(i)
        except UnreadablePicture as problem:
            self.unreadable.append(str(problem))
            return None
        return cut(image, crop_box(image.width, image.height, bucket, self._config, None, key), bucket)


class _Later:
    """What a function returns, called when it is first wanted."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._made = make, None

    def __call__(self) -> Any:
        if self._made is None:
            self._made = self._make()
        return self._made
