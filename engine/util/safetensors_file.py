"""Safetensors writer: tensors go to disk one at a time, or in parts.

    8 bytes N, little-endian | N bytes of JSON, blanks at its end | data of all tensors, without gaps

The format is https://github.com/huggingface/safetensors#format, and any of its readers opens the files. What
is small is written by `safetensors.torch.save`; this is for what should not be in memory twice, and for what
is hashed on its way to disk. torch is imported where it is needed, because commands that train nothing import
this folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from millrace.engine.util.files import HashingFile

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""The format's names of torch's dtypes."""
_PAGE = 4096


def dtype_code(dtype: torch.dtype) -> str:
    """The format's name of a dtype: F32, BF16, I64, ... Raises ValueError for one that is not stored."""
    name = str(dtype).removeprefix("torch.")
    if name not in _CODES:
        raise ValueError(f"{dtype} cannot be stored")
    return _CODES[name]


def dtype_of(code: str) -> torch.dtype:
    """The dtype that the format calls `code`."""
    import torch

    return {code: getattr(torch, name) for name, code in _CODES.items()}[code]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, shared and not copied."""
    import torch

    return memoryview(tensor.detach().flatten().view(torch.uint8).numpy())


def write_safetensors(
    file: BinaryIO | HashingFile,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
    look: Callable[[str, Tensor], None] | None = None,
) -> dict[str, int]:
    """Write a whole file from its start to its end, copying to the host one tensor at a time.

    Args:
        tensors: by name, of any shape, on any device.
        metadata: texts for the header.
        look: called with the name and the host's copy of each tensor before it is written.

    Returns the place of each tensor's first byte in the file. Raises ValueError for a dtype that is not
    stored, OSError if the disk refuses.
    """
    # Wide elements first, as the format advises: every tensor then starts at a multiple of its element size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    entries, end = {}, 0
    for name, tensor in ordered:
        entries[name] = _entry(tensor.dtype, tensor.shape, end)
        end += tensor.nbytes
    header = _header(entries, metadata)
    file.write(header)
    for name, tensor in ordered:
        host = tensor.detach().cpu().contiguous()
        if look is not None:
            look(name, host)
        file.write(tensor_bytes(host))
    return {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}


class GrowingTensorFile:
    """A file whose first tensor is written in parts along its first dimension, in bounded memory.

    The header gets a fixed room at the start, which is filled at the end.
    """

    def __init__(self, file: BinaryIO, name: str, metadata: dict[str, str]) -> None:
        self._file, self._name, self._metadata = file, name, metadata
        self._room = -(-(len(json.dumps(metadata)) + 2048) // _PAGE) * _PAGE
        self._rows, self._shape, self._dtype = 0, (), None
        file.seek(self._room)

    def append(self, part: Tensor) -> None:
        """More of the first tensor; at least once."""
        self._rows += len(part)
        self._shape, self._dtype = tuple(part.shape[1:]), part.dtype
        self._write(part)

    def finish(self, others: dict[str, Tensor]) -> None:
        """Write the other tensors and the header. Raises ValueError where that outgrows its room."""
        import torch

        entries = {self._name: _entry(self._dtype, (self._rows, *self._shape), 0)}
        at = self._file.tell()
        if at % 8:  # so that what follows can be mapped at its own alignment
            others = {"padding": torch.zeros(8 - at % 8, dtype=torch.uint8), **others}
        ordered = sorted(others.items(), key=lambda item: (item[0] != "padding", -item[1].element_size()))
        for name, tensor in ordered:
            entries[name] = _entry(tensor.dtype, tensor.shape, self._file.tell() - self._room)
            self._write(tensor)
        header = _header(entries, self._metadata, self._room)
        self._file.seek(0)
        self._file.write(header)

    def _write(self, tensor: Tensor) -> None:
        self._file.write(tensor_bytes(tensor.cpu().contiguous()))


def _entry(dtype: torch.dtype, shape: Iterable[int], begin: int) -> dict[str, Any]:
    """What the header says of a tensor whose data begin at this byte of all data."""
    size = dtype.itemsize
    for n in shape:
        size *= n
    return {"dtype": dtype_code(dtype), "shape": list(shape), "data_offsets": [begin, begin + size]}


def _header(entries: dict[str, Any], metadata: dict[str, str] | None, room: int | None = None) -> bytes:
    """All before the data: of `room` bytes, or of as many as it takes to end at a multiple of 8."""
    head = {} if metadata is None else {"__metadata__": metadata}
    text = json.dumps(head | entries).encode()
    size = len(text) + -len(text) % 8 if room is None else room - 8
    if len(text) > size:
        raise ValueError(f"the header has {len(text)} bytes, there is room for {size}")
    return size.to_bytes(8, "little") + text.ljust(size)
