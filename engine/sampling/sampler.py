"""ODE sampler (Euler, Heun): integrates the learned velocity from noise (t = 1) to data (t = 0)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from millrace.engine.config import Config, Sampling
from millrace.engine.encoders.autoencoder import Autoencoder
from millrace.engine.encoders.text_encoder import TextEncoder
from millrace.engine.losses.contrastive import MeanTarget
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.model.conversion import empty_denoiser
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.guidance_branches import solver_steps
from millrace.engine.model.layout import patchify, unpatchify
from millrace.engine.sampling.guidance import Guidance
from millrace.engine.util.errors import UserError
from millrace.engine.util.randomness import Purpose
from millrace.kernels.ops.geglu import liger_obstacle
from millrace.kernels.support.packed import to_device
from millrace.kernels.support.philox import normal, sample_keys

Shape = tuple[int, int, int]
"""Channels, height and width of a latent."""


def filled_denoiser(config: Config, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> Denoiser:
    """A denoiser for sampling whose parameters and buffers are `weights` themselves: no second copy.

    Args:
        config: its sections `model` and `routing`.
        weights: (name, tensor), taken one after another to the end. Only one that lies elsewhere than on
            `device`, or not in FP32, is copied. Names that the denoiser does not have are passed over.

    Returns:
        In evaluation, without gradients; whoever changes the tensors that came in changes it.
    """
    model = config.model
    if model.geglu_backend == "liger" and liger_obstacle(device):  # trained on another machine, say
        model = model.model_copy(update={"geglu_backend": "auto"})
    denoiser = empty_denoiser(model, config.routing)
    names = denoiser.state_dict().keys()
    # Detached: `assign` takes a Parameter as it is, and training's must go on to have gradients.
    state = {name: weight.detach().to(device, torch.float32) for name, weight in weights if name in names}
    denoiser.load_state_dict(state, assign=True)
    return denoiser.eval().requires_grad_(False)


class Sampler:
    """Generates pictures with a denoiser and the frozen networks of its training run.

    Args:
        denoiser: in evaluation, on the device of the other networks.
        flow: the objective that it was trained with (prediction type, time shift, noise scale).
        compute: dtype of matrix products.
    """

    CHUNK = 32
    """Pictures generated at once."""

    def __init__(
        self,
        denoiser: Denoiser,
        flow: FlowMatching,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        device: torch.device,
        compute: torch.dtype,
    ) -> None:
        self.denoiser, self.flow = denoiser, flow
        self.autoencoder, self.text_encoder = autoencoder, text_encoder
        self.device, self.compute = device, compute
        self.caption_tokens = 0
        """Text tokens of the captions of all pictures so far."""

    @torch.no_grad()
    def __call__(
        self,
        prompts: list[str],
        size: tuple[int, int],
        config: Sampling,
        seed: int,
        numbers: Sequence[int] | None = None,
    ) -> Tensor:
        """Pictures (len(prompts), 3, height, width) FP32 in [-1, 1] on the CPU.

        Args:
            prompts: captions.
            size: height and width in pixels, multiples of the token's edge.
            config: solver, steps and guidance.
            seed: picture number i starts from noise that is a function of (seed, i).
            numbers: of the pictures, 0 to 2^63 - 1; default 0, 1, 2, ... A picture is the same whoever is
                beside it, and pictures of one number start from one noise.
        """
        return torch.stack(self.mixed(prompts, [size] * len(prompts), config, seed, numbers))

    @torch.no_grad()
    def mixed(
        self,
        prompts: list[str],
        sizes: list[tuple[int, int]],
        config: Sampling,
        seed: int,
        numbers: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """As a call, but every picture has a size of its own: tensors (3, height, width)."""
        edge = self.autoencoder.factor * self.denoiser.config.patch_size
        for height, width in dict.fromkeys(sizes):
            if height % edge or width % edge:
                raise UserError(
                    f"a picture of {height} x {width} pixels cannot be cut in tokens of {edge} pixels"
                )
        mean_target = self._mean_target(config)
        numbers = range(len(prompts)) if numbers is None else numbers
        pictures: list[Tensor] = []
        for first in range(0, len(prompts), self.CHUNK):
            part = slice(first, first + self.CHUNK)
            pictures += self._chunk(prompts[part], sizes[part], numbers[part], config, seed, mean_target)
        return pictures

    def _mean_target(self, config: Sampling) -> MeanTarget | None:
        """What `config.contrastive` takes back; of the same latents as the sampler's."""
        if not config.contrastive or config.mean_target is None:
            return None
        found, own = MeanTarget.load(config.mean_target, self.device), self.autoencoder
        if found.autoencoder != own.identity or len(found.values) != own.channels:
            raise UserError(
                f"{config.mean_target}: mean target of {len(found.values)} channels of {found.autoencoder!r};"
                f" the model has {own.channels} of {own.identity!r}, use --compute-mean-target"
            )
        return found

    def _chunk(
        self,
        prompts: list[str],
        sizes: list[tuple[int, int]],
        numbers: Sequence[int],
        config: Sampling,
        seed: int,
        mean_target: MeanTarget | None,
    ) -> list[Tensor]:
        count, patch, factor = len(prompts), self.denoiser.config.patch_size, self.autoencoder.factor
        shapes = [(self.autoencoder.channels, height // factor, width // factor) for height, width in sizes]
        grids = [(height // patch, width // patch) for _, height, width in shapes]
        index = to_device(torch.tensor(numbers, dtype=torch.int64), self.device)
        captions = self.text_encoder.encode(prompts)
        self.caption_tokens += len(captions.embeddings)
        velocity = Guidance(
            self.denoiser,
            self.flow,
            config,
            captions,
            self.text_encoder.encode([""] * count) if config.captionless else None,
            grids,
            seed,
            index,
            self.compute,
            mean_target,
        )
        noise = self._start(index, shapes, seed)
        scales = [self.flow.noise_scale(grid) for grid in grids]
        x = torch.cat([scale * patchify(each, patch) for scale, each in zip(scales, noise, strict=True)])
        for i, (t, after, twice) in enumerate(solver_steps(config, self.flow.config.time_shift)):
            v = velocity(x, t, i)
            ahead = x + (after - t) * v
            if twice:
                ahead = x + (after - t) * 0.5 * (v + velocity(ahead, after, i))
            x = ahead
        tokens = x.split([rows * columns for rows, columns in grids])
        pictures: list[Tensor] = [torch.empty(0)] * count
        for members in _by_shape(shapes).values():
            latents = torch.stack([unpatchify(tokens[i], grids[i], patch) for i in members])
            for i, picture in zip(members, self.autoencoder.decode(latents).cpu(), strict=True):
                pictures[i] = picture
        return pictures

    def _start(self, index: Tensor, shapes: list[Shape], seed: int) -> list[Tensor]:
        """Noise of each picture, of its shape; pictures of one shape are drawn together."""
        found: list[Tensor] = [torch.empty(0)] * len(shapes)
        for (channels, height, width), members in _by_shape(shapes).items():
            count, rows = len(members), channels * height
            offsets = torch.arange(count + 1, dtype=torch.int32, device=self.device) * rows
            keys = sample_keys(seed, index[members], Purpose.PICTURE)
            noise = normal(keys, offsets, count * rows, width, rows)
            for i, each in zip(members, noise.view(count, channels, height, width), strict=True):
                found[i] = each
        return found


def _by_shape(shapes: list[Shape]) -> dict[Shape, list[int]]:
    members: dict[Shape, list[int]] = {}
    for i, shape in enumerate(shapes):
        members.setdefault(shape, []).append(i)
    return members
