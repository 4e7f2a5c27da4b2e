"""LPIPS with VGG16: a learned perceptual distance of pictures (Zhang et al., arXiv 1801.03924, version 0.1).

    d(x, y) = sum over 5 stages of mean over positions of sum over channels c of w_c (f_c(x) - f_c(y))^2

f is the stage's last activation, scaled to length one at each position; w >= 0 are the learned weights of
the stage. Neither torchvision nor the `lpips` package is needed, only their weights.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from millrace.engine.encoders.pretrained import unreadable
from millrace.engine.util.errors import UserError

STAGES = (2, 2, 3, 3, 3)
"""Convolutions of VGG16 before each of its poolings."""
WIDTHS = (64, 128, 256, 512, 512)
"""Channels of the published weights, stage by stage."""
SMALLEST = 2 ** (len(STAGES) - 1)
"""Pixels of an edge from which every stage has a position."""

_KEY = "objective.lpips.path"
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_PARTS = ("vgg16*.pth", "vgg.pth")


class Lpips(nn.Module):
    """The distance of two stacks of pictures.

    Args:
        widths: channels of the stages.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        before = (3, *widths)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                nn.Conv2d(before[i] if j == 0 else widths[i], widths[i], 3, padding=1) for j in range(count)
            )
            for i, count in enumerate(STAGES)
        )
        self.heads = nn.ParameterList(nn.Parameter(torch.ones(width)) for width in widths)
        self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None], persistent=False)

    def forward(self, pictures: Tensor, wanted: Tensor) -> Tensor:
        """Distance (B,) FP32 of pictures (B, 3, h, w) FP32 in [-1, 1] from `wanted`, of the same shape.

        The convolutions compute in their weights' dtype, outside autocast, the rest in FP32. Only
        `pictures` get a gradient.
        """
        height, width = pictures.shape[-2:]
        if min(height, width) < SMALLEST:
            raise UserError(
                f"LPIPS cannot compare pictures of {height} x {width} pixels, it needs {SMALLEST}; raise "
                "objective.lpips.resize or data.resolution"
            )
        with torch.autocast(pictures.device.type, enabled=False):
            with torch.no_grad():
                theirs = self._features(wanted)
            distance = pictures.new_zeros(len(pictures), dtype=torch.float32)
            for ours, other, weight in zip(self._features(pictures), theirs, self.heads, strict=True):
                gap = (ours - other).square()
                distance = distance + (gap * weight.float()[:, None, None]).sum(1).mean((1, 2))
        return distance

    def _features(self, pictures: Tensor) -> list[Tensor]:
        """Activations of unit length (B, C, h', w') FP32 at the end of each stage."""
        x = ((pictures.float() - self.shift) / self.scale).to(self.stages[0][0].weight.dtype)
        found = []
        for i, stage in enumerate(self.stages):
            x = F.max_pool2d(x, 2) if i else x
            for convolution in stage:
                x = F.relu(convolution(x))
            # A position may have no activation at all; `normalize` has a gradient there, x / |x| has none.
            found.append(F.normalize(x.float(), dim=1, eps=1e-10))
        return found


def load_lpips(path: str, device: torch.device, dtype: torch.dtype) -> Lpips:
    """A frozen LPIPS on `device`, with convolutions in `dtype`, from the published weights.

    Args:
        path: a file (safetensors, or a PyTorch state dict) with everything, or a folder that holds one
            `*.safetensors`, or torchvision's `vgg16*.pth` and the lpips package's `vgg.pth`. Names of the
            package, of its parts, and of this module are all understood.
        device, dtype: of the network.

    Raises UserError if the weights cannot be read or are not all there.
    """
    state = {}
    for file in _files(Path(path)):
        state |= {_own_name(name): value for name, value in _read(file, path).items()}
    network = Lpips(_widths(state))
    wanted = network.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    if missing:
        raise UserError(
            f"{path!r} lacks {len(missing)} weights of LPIPS, {missing[0]!r} for one; set {_KEY} to those of "
            "VGG16 with LPIPS' linear heads"
        )
    try:
        network.load_state_dict({name: state[name].reshape(wanted[name].shape) for name in wanted})
    except RuntimeError as error:
        raise unreadable(path, _KEY, error) from None
    network.stages.to(dtype)
    return network.requires_grad_(False).eval().to(device)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    whole = sorted(path.glob("*.safetensors"))
    if len(whole) == 1:
        return whole
    found = [sorted(path.glob(pattern)) for pattern in _PARTS]
    if not all(len(files) == 1 for files in found):
        raise UserError(
            f"{str(path)!r} holds neither one *.safetensors nor {_PARTS[0]} and {_PARTS[1]}; set {_KEY} to a "
            "folder or file with the weights of VGG16 and of LPIPS' linear heads"
        )
    return [file for (file,) in found]


def _read(file: Path, path: str) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"{file.name} is no state dict")
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # what torch.load raises for a file that is none is not documented
        raise unreadable(path, _KEY, error) from None


def _own_name(name: str) -> str:
    """`features.N` of torchvision, `net.sliceK.N` and `linK.model.N` of lpips, as this module names them."""
    parts = name.split(".")
    kind = parts[-1]
    if parts[0] == "features" or (parts[0] == "net" and len(parts) == 4):
        place = _PLACES.get(parts[-2])
        return f"stages.{place[0]}.{place[1]}.{kind}" if place else name
    if parts[0].startswith("lin") and kind == "weight":
        return f"heads.{parts[0][3:]}"
    return name


def _places() -> dict[str, tuple[int, int]]:
    """Index of a convolution in torchvision's list of layers -> its stage and place."""
    found, index = {}, 0
    for i, count in enumerate(STAGES):
        for j in range(count):
            found[str(index)] = (i, j)
            index += 2  # a ReLU after each
        index += 1  # a pooling
    return found


_PLACES = _places()


def _widths(state: dict[str, Tensor]) -> tuple[int, ...]:
    """Channels of the stages in `state`; the published ones where they are not to be had."""
    firsts = [state.get(f"stages.{i}.0.weight") for i in range(len(STAGES))]
    return WIDTHS if any(first is None for first in firsts) else tuple(len(first) for first in firsts)


def tiny_lpips(folder: Path, widths: tuple[int, ...] = (4, 4, 6, 6, 8)) -> Path:
    """Save a narrow LPIPS with random weights in `folder`, for `--smoke` and tests; returns it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Lpips(widths)
        for weight in network.heads:
            weight.data.uniform_()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), folder / "lpips.safetensors")
    return folder
