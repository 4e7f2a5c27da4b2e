"""Publishing: a data set that is complete takes the place of what is there.

The new one lies whole in OUTPUT/.ready. Its files are moved one after another, and manifest.json last;
meanwhile there is none, so nothing reads a mixture. After a kill the next call goes on.
"""

import os
import re
import shutil
from pathlib import Path

from millrace.engine.data.formats.shard_index import read_manifest
from millrace.engine.util.files import sync_folder

READY = ".ready"
_MADE = (".tar", ".idx", ".npy", ".keys", ".text.safetensors", ".latents.safetensors")
"""How names of files of a shard end."""


def publish(output: Path, work: Path) -> None:
    """Move the data set that is ready to `output`, if there is one; remove the shards that it lacks, and the
    converted parts in `work`. Raises OSError."""
    ready = output / READY
    if not ready.exists():
        return
    if (ready / "manifest.json").exists():
        manifest = read_manifest(ready)
        (output / "manifest.json").unlink(missing_ok=True)
        sync_folder(output)
        for path in sorted(ready.rglob("*")):
            if path.is_file() and path.name != "manifest.json":
                target = output / path.relative_to(ready)
                target.parent.mkdir(exist_ok=True)
                os.replace(path, target)
        for folder in remove_shards(output, {shard.file for shard in manifest.shards}):
            sync_folder(folder)
        for name in ("parts", "shards"):
            shutil.rmtree(work / name, ignore_errors=True)
            (work / name).mkdir()
        os.replace(ready / "manifest.json", output / "manifest.json")
        sync_folder(output)
    shutil.rmtree(ready)


def remove_shards(root: Path, kept: set[str]) -> list[Path]:
    """Remove the files of all shards but those that are `kept`; the folders of these."""
    folders = []
    for folder in sorted(root.iterdir()):
        if not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", folder.name) or not folder.is_dir():
            continue
        for path in sorted(folder.iterdir()):
            number, _, rest = path.name.partition(".")
            if f".{rest}" in _MADE and f"{folder.name}/{number}.tar" not in kept:
                path.unlink()
        if any(folder.iterdir()):
            folders.append(folder)
        else:
            folder.rmdir()
    return folders
