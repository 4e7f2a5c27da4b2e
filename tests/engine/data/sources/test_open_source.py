import json

from PIL import Image

from millrace.engine.config import Data
from millrace.engine.data import fingerprint, open_source
from millrace.engine.data.sources.builtin import BuiltinSource
from millrace.engine.data.sources.folder import FolderSource


def folder(path, captions):
    path.mkdir()
    for name, caption in captions.items():
        Image.new("RGB", (8, 8)).save(path / f"{name}.png")
        (path / f"{name}.json").write_text(json.dumps({"caption": caption}))
    return FolderSource(path)


def test_the_configuration_chooses_the_source(tmp_path):
    folder(tmp_path / "a", {"x": "a fox"})
    assert isinstance(open_source(Data(source="builtin")), BuiltinSource)
    assert isinstance(open_source(Data(source="folder", path=str(tmp_path / "a"))), FolderSource)


def test_fingerprint_follows_keys_captions_and_their_order(tmp_path):
    captions = {"x": "a fox", "y": "a cat"}
    one = fingerprint(folder(tmp_path / "a", captions))
    assert one == fingerprint(folder(tmp_path / "b", captions))
    others = [
        {"x": "a fox", "y": "a dog"},
        {"x": "a fox", "z": "a cat"},
        {"x": "a cat", "y": "a fox"},
        {"x": "a fox"},
    ]
    prints = {fingerprint(folder(tmp_path / f"c{i}", other)) for i, other in enumerate(others)}
    assert len(prints) == 4
    assert one not in prints
