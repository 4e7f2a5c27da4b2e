"""Inception-v3 of FID: TensorFlow's network of 2015-12-05, as PyTorch reads it.

    uint8 pictures ──299 x 299 as TensorFlow 1 resizes──▶ (x - 128) / 128 ──▶ convolutions ──mean──▶ (B, 2048)

It is not torchvision's Inception-v3: its average pooling leaves the border's zeros out, the last block pools
by maximum, and its weights were trained elsewhere. Tensors have the names of torch-fidelity and pytorch-fid,
which publish the same file (`PUBLISHED`). torch-fidelity itself needs torchvision to be imported, so the
network is spelled out here, as a table; the tests compare it with theirs where it is installed.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256_file

SIZE = 299
"""Edge in pixels of what the network sees."""
DIM = 2048
"""Features of a picture."""
SMALLEST = 75
"""Edge from which every layer has a position."""
PUBLISHED = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
"""Names of the published file (95,628,359 bytes) in torch-fidelity's release v0.2.0 and in pytorch-fid's
release fid_weights."""
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of that file."""

Kernel = int | tuple[int, int]


class Layer(NamedTuple):
    """A convolution with batch norm and ReLU, by the name of its weights."""

    name: str
    channels: int
    kernel: Kernel
    stride: int = 1


Step = Layer | tuple[Layer, ...] | str
"""A layer, layers side by side whose results are joined, or a pooling: average, max, or halve (max, stride
2)."""
Branches = tuple[tuple[Step, ...], ...]
"""What a block computes side by side and joins."""


def _block_a(pooled: int) -> Branches:
    return (
        (Layer("branch1x1", 64, 1),),
        (Layer("branch5x5_1", 48, 1), Layer("branch5x5_2", 64, 5)),
        (Layer("branch3x3dbl_1", 64, 1), Layer("branch3x3dbl_2", 96, 3), Layer("branch3x3dbl_3", 96, 3)),
        ("average", Layer("branch_pool", pooled, 1)),
    )


def _block_c(width: int) -> Branches:
    row, column = (1, 7), (7, 1)
    return (
        (Layer("branch1x1", 192, 1),),
        (
            Layer("branch7x7_1", width, 1),
            Layer("branch7x7_2", width, row),
            Layer("branch7x7_3", 192, column),
        ),
        (
            Layer("branch7x7dbl_1", width, 1),
            Layer("branch7x7dbl_2", width, column),
            Layer("branch7x7dbl_3", width, row),
            Layer("branch7x7dbl_4", width, column),
            Layer("branch7x7dbl_5", 192, row),
        ),
        ("average", Layer("branch_pool", 192, 1)),
    )


def _block_e(pooling: str) -> Branches:
    row, column = (1, 3), (3, 1)
    return (
        (Layer("branch1x1", 320, 1),),
        (
            Layer("branch3x3_1", 384, 1),
            (Layer("branch3x3_2a", 384, row), Layer("branch3x3_2b", 384, column)),
        ),
        (
            Layer("branch3x3dbl_1", 448, 1),
            Layer("branch3x3dbl_2", 384, 3),
            (Layer("branch3x3dbl_3a", 384, row), Layer("branch3x3dbl_3b", 384, column)),
        ),
        (pooling, Layer("branch_pool", 192, 1)),
    )


_BLOCK_B: Branches = (
    (Layer("branch3x3", 384, 3, 2),),
    (Layer("branch3x3dbl_1", 64, 1), Layer("branch3x3dbl_2", 96, 3), Layer("branch3x3dbl_3", 96, 3, 2)),
    ("halve",),
)
_BLOCK_D: Branches = (
    (Layer("branch3x3_1", 192, 1), Layer("branch3x3_2", 320, 3, 2)),
    (
        Layer("branch7x7x3_1", 192, 1),
        Layer("branch7x7x3_2", 192, (1, 7)),
        Layer("branch7x7x3_3", 192, (7, 1)),
        Layer("branch7x7x3_4", 192, 3, 2),
    ),
    ("halve",),
)
_BLOCKS: dict[str, Branches] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _BLOCK_B,
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _BLOCK_D,
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("max"),
}


class Convolution(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, stride: int, padding: Kernel) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Branches of a table, side by side; `outputs` is their channels together."""

    def __init__(self, inputs: int, branches: Branches, share: float) -> None:
        super().__init__()
        self.branches, self.outputs = branches, 0
        for branch in branches:
            channels = inputs
            for step in branch:
                layers = (step,) if isinstance(step, Layer) else step if isinstance(step, tuple) else ()
                for layer in layers:
                    height, width = _pair(layer.kernel)
                    # With stride 1 a block keeps its size; those with stride 2 see whole windows only.
                    padding = (height // 2, width // 2) if layer.stride == 1 else 0
                    outputs = _share(layer.channels, share)
                    self.add_module(
                        layer.name, Convolution(channels, outputs, layer.kernel, layer.stride, padding)
                    )
                if layers:
                    channels = sum(_share(layer.channels, share) for layer in layers)
            self.outputs += channels

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._branch(x, branch) for branch in self.branches], 1)

    def _branch(self, x: Tensor, branch: tuple[Step, ...]) -> Tensor:
        for step in branch:
            if isinstance(step, Layer):
                x = getattr(self, step.name)(x)
            elif isinstance(step, tuple):
                x = torch.cat([getattr(self, layer.name)(x) for layer in step], 1)
            elif step == "average":
                x = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            elif step == "max":
                x = F.max_pool2d(x, 3, stride=1, padding=1)
            else:
                x = F.max_pool2d(x, 3, stride=2)
        return x


class Inception(nn.Module):
    """Features of pictures.

    Args:
        share: of the published channels; 1 is the network of FID.
        size: edge in pixels that pictures are resized to.
    """

    def __init__(self, share: float = 1.0, size: int = SIZE) -> None:
        super().__init__()
        if size < SMALLEST:
            raise ValueError(f"size is {size}, the network needs {SMALLEST} pixels")
        widths = [_share(channels, share) for channels in (32, 32, 64, 80, 192)]
        self.Conv2d_1a_3x3 = Convolution(3, widths[0], 3, 2, 0)
        self.Conv2d_2a_3x3 = Convolution(widths[0], widths[1], 3, 1, 0)
        self.Conv2d_2b_3x3 = Convolution(widths[1], widths[2], 3, 1, 1)
        self.Conv2d_3b_1x1 = Convolution(widths[2], widths[3], 1, 1, 0)
        self.Conv2d_4a_3x3 = Convolution(widths[3], widths[4], 3, 1, 0)
        channels = widths[4]
        for name, branches in _BLOCKS.items():
            block = Block(channels, branches, share)
            self.add_module(name, block)
            channels = block.outputs
        self.dim, self.size = channels, size

    def forward(self, pictures: Tensor) -> Tensor:
        """Features (B, dim) FP32 of uint8 pictures (B, 3, h, w), outside autocast."""
        with torch.autocast(pictures.device.type, enabled=False):
            x = (resize_as_tensorflow(pictures.float(), self.size) - 128) / 128
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
            x = F.max_pool2d(x, 3, stride=2)
            for name in _BLOCKS:
                x = getattr(self, name)(x)
            return F.adaptive_avg_pool2d(x, 1).flatten(1)


def resize_as_tensorflow(x: Tensor, size: int) -> Tensor:
    """(B, C, h, w) FP32 to (B, C, size, size), bilinear as TensorFlow 1 did it: output position i reads at
    i * h / size, without the half pixel that everybody adds since, and without averaging when it shrinks."""
    rows, columns = (_positions(edge, size, x.device) for edge in x.shape[2:])
    low, high, within = columns
    left = x[..., low]
    x = left + (x[..., high] - left) * within
    low, high, within = rows
    top = x[..., low, :]
    return top + (x[..., high, :] - top) * within[:, None]


def _positions(edge: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels below and above each output position, and how far it is on the way between them."""
    place = torch.arange(size, dtype=torch.float32, device=device) * torch.tensor(edge / size)
    low = place.long()
    return low, (low + 1).clamp_max(edge - 1), place - low.float()


def load_inception(path: str, key: str, device: torch.device) -> tuple[Inception, str]:
    """A frozen FP32 Inception on `device`, and the SHA-256 of the file it was read from.

    Args:
        path: the published file, a copy of it as safetensors, or a folder that holds one of them.
        key: the setting to name in errors.

    Raises UserError if the file cannot be read or does not hold this network.
    """
    file = _file(Path(path), key)
    try:
        digest = sha256_file(file)
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise ValueError("it is no state dict")
    except Exception as error:  # what torch.load raises for a file that is none is not documented
        reason = next(iter(str(error).strip().splitlines()), repr(error)).strip(" .:")
        raise UserError(f"cannot load {str(file)!r}: {reason}; {_wanted(key)}") from None
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    size = state.pop("size", torch.tensor(SIZE))
    first = state.get("Conv2d_1a_3x3.conv.weight")
    network = Inception(1.0 if first is None else len(first) / 32, int(size))
    # A file may lack how many batches a norm has seen, which nothing reads.
    wanted = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    lacking = [n for n in sorted(wanted) if n not in state or state[n].shape != wanted[n].shape]
    if lacking:
        raise UserError(
            f"{str(file)!r} lacks {len(lacking)} of {len(wanted)} weights of FID's Inception, {lacking[0]!r} "
            f"for one; {_wanted(key)}"
        )
    network.load_state_dict({name: state[name] for name in wanted}, strict=False)
    return network.float().requires_grad_(False).eval().to(device), digest


def _file(path: Path, key: str) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in PUBLISHED if (path / name).is_file()] or [*path.glob("*.safetensors")]
    if not found:
        raise UserError(f"{str(path)!r} holds no weights of Inception; {_wanted(key)}")
    return sorted(found)[0]


def _wanted(key: str) -> str:
    return f"set {key} to {PUBLISHED[0]} of torch-fidelity or {PUBLISHED[1]} of pytorch-fid"


def _share(channels: int, share: float) -> int:
    return max(1, round(channels * share))


def _pair(kernel: Kernel) -> tuple[int, int]:
    return kernel if isinstance(kernel, tuple) else (kernel, kernel)


def tiny_inception(folder: Path) -> Path:
    """Save an Inception of an eighth of the channels, for pictures of 75 pixels, in `folder`; returns it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Inception(1 / 8, SMALLEST)
        for name, parameter in network.named_parameters():
            if name.endswith("conv.weight"):
                torch.nn.init.kaiming_normal_(parameter)
    folder.mkdir(parents=True, exist_ok=True)
    state = network.state_dict() | {"size": torch.tensor(SMALLEST)}
    save_file(state, folder / f"{Path(PUBLISHED[0]).stem}.safetensors")
    return folder
