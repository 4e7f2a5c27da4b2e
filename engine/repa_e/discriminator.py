"""PatchGAN, the discriminator of pix2pix (arXiv 1611.07004) in the form of VQGAN's code, that REPA-E
trains."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from millrace.engine.encoders.pretrained import load
from millrace.engine.util.errors import UserError

LAYERS = 3
SLOPE = 0.2
INIT_STD = 0.02
_KEY = "conditioning.autoencoder.tuning.discriminator_path"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Discriminator(nn.Module):
    """Logits of overlapping patches of 70 x 70 pixels: above 0 where a picture looks real.

        4x4 convolutions: 3 ──/2──▶ W ──/2──▶ 2W ──/2──▶ 4W ──▶ 8W ──▶ 1, LeakyReLU(0.2) between,
        BatchNorm after all but the first and the last

    BatchNorm takes the statistics of the pictures that go through together, in training, which is all there
    is: it keeps no running ones. Names are those of VQGAN's code, so its weights load.

    Args:
        width: W.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(SLOPE)]
        channels = width
        for i in range(1, LAYERS + 1):
            wider = width * min(2**i, 8)
            layers += [
                nn.Conv2d(channels, wider, 4, 2 if i < LAYERS else 1, 1, bias=False),
                nn.BatchNorm2d(wider, track_running_stats=False),
                nn.LeakyReLU(SLOPE),
            ]
            channels = wider
        self.main = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, 1, 1))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fill all parameters from `generator` (CPU): weights N(0, 0.02) and N(1, 0.02) as in pix2pix's code,
        biases of convolutions uniform as PyTorch's, of norms zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(
                    torch.empty(module.weight.shape).normal_(0, INIT_STD, generator=generator)
                )
                if module.bias is not None:
                    bound = module.weight[0].numel() ** -0.5
                    drawn = torch.empty(module.bias.shape).uniform_(-bound, bound, generator=generator)
                    module.bias.copy_(drawn)
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(
                    torch.empty(module.weight.shape).normal_(1, INIT_STD, generator=generator)
                )
                module.bias.zero_()

    def load_file(self, path: str) -> None:
        """Fill all parameters from a state dict of these names, .safetensors or PyTorch's. Raises
        UserError."""
        reads = load_file if Path(path).suffix == ".safetensors" else _load_pickle
        state = load(reads, path, _KEY)
        state = {name: value for name, value in state.items() if name.rpartition(".")[2] not in _STATISTICS}
        wanted = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        if wanted != {name: tuple(value.shape) for name, value in state.items()}:
            raise UserError(
                f"{path!r} does not hold this discriminator ({len(wanted)} tensors, the first of "
                f"{wanted['main.0.weight'][0]} channels); set {_KEY} or discriminator_width beside it"
            )
        self.load_state_dict(state)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) in [-1, 1] -> logits (B, 1, h/8 - 2, w/8 - 2). Edges of at least 24 pixels."""
        return self.main(images)


def _load_pickle(path: str) -> dict[str, Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)
