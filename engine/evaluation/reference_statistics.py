"""Reference statistics on disk: one safetensors file for each metric, data set and network.

    datasets/unsplash                 reference pictures
    datasets/unsplash.statistics/     their statistics, for all who may read the folder

The file's header holds an identity (metric, network, preprocessing, pictures) and the SHA-256 of the tensors,
in order of their names. What does not match either is refused and named; nothing is repaired or made anew
silently.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from millrace.engine.util import node_cache
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256, sha256_json, write_atomically

FORMAT = "1"

Identity = dict[str, str]
"""Everything that statistics depend on, by name."""


def folders(cache: str | None, pictures: str | None) -> list[Path]:
    """Where statistics may lie, the first choice first.

    Args:
        cache: the folder that the configuration names; then there is no other.
        pictures: the folder of the reference pictures, where they lie in one.
    """
    if cache is not None:
        return [Path(cache)]
    root = Path(pictures).resolve() if pictures is not None else None
    beside = [] if root is None else [root.with_name(f"{root.name}.statistics")]
    return [*beside, node_cache.folder() / "reference-statistics"]


def path_of(folder: Path, identity: Identity) -> Path:
    """Where statistics of this identity lie in one of the folders."""
    return folder / f"{identity['metric']}-{sha256_json(identity)[:16]}.safetensors"


def read(path: Path, identity: Identity) -> dict[str, Tensor]:
    """Tensors by name. Raises UserError for a file that is damaged or of another identity."""
    again = "delete it, and it is made again"
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged: {error}; {again}") from None
    stored = {name: value for name, value in header.items() if name not in ("format", "sha256")}
    if header.get("format") != FORMAT:
        raise UserError(f"{path} has format {header.get('format')}, not {FORMAT}; {again}")
    digest = checksum(tensors, stored)
    if header.get("sha256") != digest:
        raise UserError(f"{path} is damaged: sha256 {digest}, expected {header.get('sha256')}; {again}")
    for name in sorted(identity.keys() | stored.keys()):
        if stored.get(name) != identity.get(name):
            raise UserError(
                f"{path} is of the {name} {stored.get(name)!r}, not of {identity.get(name)!r}; {again}"
            )
    return tensors


def write(paths: list[Path], identity: Identity, tensors: dict[str, Tensor]) -> Path:
    """Write whole or not at all, to the first of `paths` where that is possible, and return it. Raises
    UserError where none is."""
    header = {"format": FORMAT, "sha256": checksum(tensors, identity), **identity}
    content, problems = save({key: value.contiguous() for key, value in tensors.items()}, header), []
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
            return path
        except OSError as error:
            problems.append(f"{path}: cannot be written: {error.strerror}")
    raise UserError(f"{'; '.join(problems)}; set evaluation.cache to another folder")


def checksum(tensors: dict[str, Tensor], identity: Identity) -> str:
    """SHA-256 of the identity and of the tensors' bytes in order of their names."""

    def described() -> Iterator[bytes]:
        yield json.dumps(identity, sort_keys=True).encode()
        for name in sorted(tensors):
            value = tensors[name].contiguous()
            yield f"{name} {value.dtype} {tuple(value.shape)}".encode()
            yield value.reshape(-1).numpy().tobytes()

    return sha256(described())
