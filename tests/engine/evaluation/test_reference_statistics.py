"""Statistics on disk come back bit for bit, or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from millrace.engine.evaluation import reference_statistics
from millrace.engine.util.errors import UserError

IDENTITY = {
    "metric": "cmmd",
    "network": "CLIP-4, weights 12",
    "preprocessing": "none",
    "pictures": "3 of them",
}
TENSORS = {"rows": torch.arange(12.0).view(3, 4), "within": torch.tensor(-1.5, dtype=torch.float64)}


@pytest.fixture
def path(tmp_path):
    found = reference_statistics.path_of(tmp_path / "cache", IDENTITY)
    assert reference_statistics.write([found], IDENTITY, TENSORS) == found
    return found


def refusal(path, identity=IDENTITY):
    with pytest.raises(UserError) as caught:
        reference_statistics.read(path, identity)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_there_and_back(path):
    found = reference_statistics.read(path, IDENTITY)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.name.startswith("cmmd-")


@pytest.mark.parametrize("name", ["network", "preprocessing", "pictures", "metric"])
def test_another_identity(path, name):
    other = IDENTITY | {name: "something else"}
    assert reference_statistics.path_of(path.parent, other) != path
    assert f"is of the {name} {IDENTITY[name]!r}, not of 'something else'; delete it" in refusal(path, other)


@pytest.mark.parametrize("place", [0.3, 0.999])
def test_a_flipped_bit(path, place):
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    assert "is damaged" in refusal(path)


def test_a_shortened_file(path):
    path.write_bytes(path.read_bytes()[:-5])
    assert "is damaged" in refusal(path)


def test_a_file_of_something_else(path):
    save_file({"rows": torch.zeros(2)}, path)
    assert "has format None, not 1" in refusal(path)
    path.write_text("not safetensors")
    assert "is damaged" in refusal(path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        reference_statistics.write([tmp_path / "file" / "x.safetensors"], IDENTITY, TENSORS)


def test_they_lie_beside_the_pictures_or_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path / "user"))
    mine = tmp_path / "user" / "reference-statistics"
    beside = tmp_path / "data" / "unsplash.statistics"
    assert reference_statistics.folders(None, str(tmp_path / "data" / "unsplash")) == [beside, mine]
    assert reference_statistics.folders(None, None) == [mine]
    assert reference_statistics.folders("named", str(tmp_path)) == [Path("named")]
    (tmp_path / "data").touch()  # where nothing can be written
    paths = [folder / "x.safetensors" for folder in (beside, mine)]
    assert reference_statistics.write(paths, IDENTITY, TENSORS) == paths[1]
    assert reference_statistics.read(paths[1], IDENTITY).keys() == TENSORS.keys()
