"""Built-in pictures: files of the installed scikit-image and scikit-learn, captioned for this project.

They need no network and no folder of one's own, so every configuration can be tried on a fresh machine.
`builtin_captions.json` pins each picture by package and file name; the files are opened directly, because
scikit-image's own loaders may reach for the network.

Of the pictures in those packages these are left out: `motorcycle_right.png` (the other eye of a stereo pair
with `motorcycle_left.png`), `chessboard_*.png`, `page.png`, `text.png`, `microaneurysms.png`,
`no_time_for_that_tiny.gif` and the faces in `lfw_subset.npy` (all below 256 pixels on an edge, the default
resolution, which would make the defaults fail) and `multipage*.tif` (test patterns for a reader).
"""

import importlib.util
import json
from pathlib import Path

from PIL import Image

from millrace.engine.config import Data
from millrace.engine.config.data import Part
from millrace.engine.data.sources.pictures import Captions, OpenSource, Source, read_picture
from millrace.engine.util.errors import UserError

_LIST = Path(__file__).with_name("builtin_captions.json")
_PROJECTS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


class BuiltinSource:
    """22 pictures with long and short captions; each is decoded once and kept (29 MiB in all)."""

    def __init__(self) -> None:
        entries = json.loads(_LIST.read_text(encoding="utf-8"))
        self._keys = [f"builtin/{entry['name']}" for entry in entries]
        self._captions = [Captions(entry["long"], entry["short"]) for entry in entries]
        self._paths = [installed(entry["package"], entry["file"]) for entry in entries]
        self._decoded: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index]

    def captions(self, index: int) -> Captions:
        return self._captions[index]

    def image(self, index: int) -> Image.Image:
        # Two threads may both decode a picture the first time; they store the same pixels.
        if index not in self._decoded:
            self._decoded[index] = read_picture(self._paths[index], profiles=False)
        return self._decoded[index]


def installed(package: str, file: str) -> Path:
    """Path of a file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"built-in pictures: {package} is not installed; pip install {_PROJECTS[package]}")
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise UserError(
            f"built-in pictures: {path} is missing; reinstall it with pip install --force-reinstall "
            f"{_PROJECTS[package]}, or set data.source to folder"
        )
    return path


def _open(_part: Data | Part, _data: Data) -> Source:
    return BuiltinSource()


ENTRY: OpenSource = _open
