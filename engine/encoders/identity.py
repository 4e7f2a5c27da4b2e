"""Identity of a frozen network: what its output depends on besides its input, found without loading it.

A cache keeps it, and training compares it with the configuration's: rows of another tower never pass for
this one's. Of a hub repository it is the commit; of a local folder a digest of the files that are loaded,
wherever the folder lies:

- configuration and tokenizer (.json, .model, .txt) whole;
- weights (.safetensors, .bin) by size, and by the SHA-256 of 64 blocks of 64 KiB spread over the file with
  its first and last bytes; up to 4 MiB whole. Training or rounding changes every tensor, and so every
  block. A change of a few bytes between the blocks would be missed; hashing 10 GB in every process at every
  start was thought too dear for that.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from millrace.engine import config as settings
from millrace.engine.encoders import autoencoder as autoencoders
from millrace.engine.encoders.latent_statistics import STATISTICS_FILE
from millrace.engine.encoders.text_encoder import CLEANING, text_encoder_entry
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256, sha256_file

Identity = dict[str, Any]

_READ_WHOLE = (".json", ".model", ".txt")
_WEIGHTS = (".safetensors", ".bin")
_BLOCK, _BLOCKS = 1 << 16, 64
_DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def text_identity(config: settings.TextTower, dim: int, dtype: torch.dtype) -> Identity:
    """Of the text encoder of `config`, which emits `dim` features in `dtype`.

    `kernels` is not part of it: every choice computes the same function in the same dtypes. Rows differ by
    rounding, as they do between two GPUs, where a cache may be made on one and read on the other as well.
    The revision of a hub repository is None where it cannot be looked up.
    """
    own = {"kind": config.kind, "dim": dim, "dtype": _DTYPE_NAMES[dtype], "max_tokens": config.max_tokens}
    own["cleaning"] = CLEANING
    entry = text_encoder_entry(config.kind)
    source = entry.source_of(config)
    if source is None:
        return own
    if Path(source).is_dir():
        return own | {"source": source, "digest": digest_of(_files(Path(source)))}
    return own | {"source": source, "revision": _looked_up(lambda: entry.revision(source))}


def autoencoder_identity(config: settings.Autoencoder) -> Identity:
    """Of the autoencoder of `config` as far as its posterior goes: `form` and scale come after that.

    The revision of a hub repository is None where it cannot be looked up.
    """
    own = {"kind": config.kind}
    if autoencoders.autoencoder_entry(config.kind).network is None:
        return own
    own["dtype"] = _DTYPE_NAMES[autoencoders.arithmetic(config)]
    source = autoencoders.source_of(config)
    if Path(source).is_dir():
        # diffusers looks at the top first.
        folder = next((f for f in (Path(source), Path(source, "vae")) if (f / "config.json").is_file()), None)
        if folder is None:
            raise UserError(
                f"{source!r} holds no config.json of an autoencoder; set conditioning.autoencoder.path"
            )
        # Statistics of a tuned autoencoder lie in either folder.
        files = {*_files(folder), *(path for path in _files(Path(source)) if path.name == STATISTICS_FILE)}
        return own | {"source": source, "digest": digest_of(files)}
    return own | {"source": source, "revision": _looked_up(lambda: autoencoders.locate(config).revision)}


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 over names and contents of files, weights by samples of them. Raises UserError."""
    described: list[bytes] = []
    for path in sorted(files, key=lambda path: path.name):
        try:
            described += [f"{path.name} {path.stat().st_size}\n".encode(), bytes.fromhex(_content(path))]
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; correct or replace it") from None
    return sha256(described)


def differing(found: Identity, wanted: Identity) -> list[str]:
    """In words, how the network of a cache differs from the one that is wanted; empty if it does not.

    A revision that could not be looked up differs from none.
    """
    skipped = {"source"} if "digest" in found and "digest" in wanted else set()
    words = []
    for key in dict.fromkeys([*wanted, *found]):
        theirs, ours = found.get(key), wanted.get(key)
        unknown = key == "revision" and ours is None and "digest" not in wanted
        if key not in skipped and theirs != ours and not unknown:
            words.append(f"{key} {_short(theirs)}, not {_short(ours)}")
    return words


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        value = value[:12]
    return "none" if value is None else str(value)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in (*_READ_WHOLE, *_WEIGHTS) and path.is_file()]


def _content(path: Path) -> str:
    """SHA-256 of a file, or where it is large of blocks of it."""
    size = path.stat().st_size
    if path.suffix in _READ_WHOLE or size <= _BLOCK * _BLOCKS:
        return sha256_file(path)
    blocks = []
    with path.open("rb") as file:
        for i in range(_BLOCKS):
            file.seek((size - _BLOCK) * i // (_BLOCKS - 1))
            blocks.append(file.read(_BLOCK))
    return sha256(blocks)


def _looked_up(revision: Callable[[], str | None]) -> str | None:
    try:
        return revision()
    except (UserError, OSError, ValueError, RuntimeError):
        return None
