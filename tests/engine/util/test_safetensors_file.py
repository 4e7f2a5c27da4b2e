"""Files that the library of the format opens, in the layout that checkpoints and caches have always had."""

import io
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file

from millrace.engine.util.safetensors_file import (
    GrowingTensorFile,
    dtype_code,
    dtype_of,
    tensor_bytes,
    write_safetensors,
)

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def written(tensors, metadata=None):
    file = io.BytesIO()
    offsets = write_safetensors(file, tensors, metadata)
    return file.getvalue(), offsets


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_comes_back(dtype):
    tensors = {
        "matrix": torch.arange(6).view(2, 3).to(dtype),
        "strided": torch.arange(12).view(3, 4).to(dtype).T,
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
        "gradient": torch.ones(2, requires_grad=True),
    }
    data, offsets = written(tensors)
    found = load(data)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        stored = data[offsets[name] : offsets[name] + tensor.nbytes]
        assert stored == bytes(tensor_bytes(tensor.contiguous()))
        assert offsets[name] % tensor.element_size() == 0
    assert dtype_of(dtype_code(dtype)) == dtype


def test_the_header_is_that_of_earlier_checkpoints():
    """Byte for byte: widest first, otherwise in the order given; blanks to a multiple of 8."""
    tensors = {"a@0": torch.tensor([1], dtype=torch.int8), "b@3": torch.ones(1), "c@0": torch.ones(2)}
    head = (
        b'{"b@3": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        b'"c@0": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, '
        b'"a@0": {"dtype": "I8", "shape": [1], "data_offsets": [12, 13]}}'
    )
    head += b" " * (-len(head) % 8)
    data, offsets = written(tensors)
    start = 8 + len(head)
    assert data == len(head).to_bytes(8, "little") + head + bytes([0, 0, 128, 63] * 3) + b"\x01"
    assert offsets == {"b@3": start, "c@0": start + 4, "a@0": start + 12}


def test_metadata_are_read_by_the_library(tmp_path):
    data, _ = written({"x": torch.zeros(2)}, {"format": "pt", "of": "ä"})
    (tmp_path / "x").write_bytes(data)
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt", "of": "ä"}


def test_a_dtype_that_the_format_lacks_is_refused():
    with pytest.raises(ValueError, match=r"torch\.complex64 cannot be stored"):
        written({"x": torch.zeros(2, dtype=torch.complex64)})


def test_files_are_safetensors_written_part_by_part(tmp_path):
    parts = [torch.randint(-9, 9, (n, 3), dtype=torch.int8) for n in (2, 0, 5)]
    others = {
        "offsets": torch.arange(4),
        "scale": torch.rand(7),
        "cut": torch.ones(3, dtype=torch.uint8),
        "half": torch.randn(3, 5).T.bfloat16(),
    }
    path = tmp_path / "file"
    with path.open("wb") as file:
        out = GrowingTensorFile(file, "rows", {"of": "a test"})
        for part in parts:
            out.append(part)
        out.finish(others)
    found = load_file(path)
    assert found.pop("padding").tolist() == [0] * 3  # 21 bytes of rows
    assert torch.equal(found.pop("rows"), torch.cat(parts))
    assert found.keys() == others.keys()
    for name, tensor in others.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def test_a_header_that_outgrows_its_room_is_an_error(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        out = GrowingTensorFile(file, "rows", {})
        out.append(torch.zeros(1))
        with pytest.raises(ValueError, match="room"):
            out.finish({f"tensor {i}": torch.zeros(1) for i in range(100)})


def test_the_header_of_a_growing_file_is_that_of_earlier_caches(tmp_path):
    """Byte for byte: a page of blanks for the header, filled at the end."""
    with (tmp_path / "file").open("wb") as file:
        out = GrowingTensorFile(file, "rows", {"of": "x"})
        for part in ([[1, 2]], [[3, 4]]):
            out.append(torch.tensor(part, dtype=torch.int8))
        out.finish({"cut": torch.tensor([5], dtype=torch.uint8), "scale": torch.ones(1)})
    data = (tmp_path / "file").read_bytes()
    assert data[:8] == (4096 - 8).to_bytes(8, "little")
    assert data[8:4096].decode().rstrip() == json.dumps(
        {
            "__metadata__": {"of": "x"},
            "rows": {"dtype": "I8", "shape": [2, 2], "data_offsets": [0, 4]},
            "padding": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]},
            "scale": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
            "cut": {"dtype": "U8", "shape": [1], "data_offsets": [12, 13]},
        }
    )
    assert data[4096:] == bytes([1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 128, 63, 5])


def test_import_needs_no_torch():
    code = "import sys, millrace.engine.util.safetensors_file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
