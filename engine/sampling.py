"""Pictures from captions: integrate the learned velocity from noise (t = 1) to data (t = 0)."""

from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from millrace.engine.conditioning.autoencoder import Autoencoder
from millrace.engine.conditioning.text import TextEncoder
from millrace.engine.config import Sampling
from millrace.engine.errors import UserError
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.packing import patchify, unpatchify
from millrace.engine.objective.flow import FlowMatching, shift_time
from millrace.kernels.random import normal, sample_keys


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
        text_tower: TextEncoder,
        device: torch.device,
        compute: torch.dtype,
    ) -> None:
        self.denoiser, self.flow = denoiser, flow
        self.autoencoder, self.text_tower = autoencoder, text_tower
        self.device, self.compute = device, compute

    @torch.no_grad()
    def __call__(self, prompts: list[str], size: tuple[int, int], config: Sampling, seed: int) -> Tensor:
        """Pictures (len(prompts), 3, height, width) FP32 in [-1, 1] on the CPU.

        Args:
            prompts: captions.
            size: height and width in pixels, multiples of the token's edge.
            config: solver, steps and guidance.
            seed: picture i starts from noise that is a function of (seed, i).
        """
        edge = self.autoencoder.factor * self.denoiser.config.patch_size
        if size[0] % edge or size[1] % edge:
            raise UserError(
                f"a picture of {size[0]} x {size[1]} pixels cannot be cut in tokens of {edge} pixels"
            )
        chunks = range(0, len(prompts), self.CHUNK)
        return torch.cat([self._chunk(prompts[i : i + self.CHUNK], i, size, config, seed) for i in chunks])

    def _chunk(
        self, prompts: list[str], first: int, size: tuple[int, int], config: Sampling, seed: int
    ) -> Tensor:
        count, patch = len(prompts), self.denoiser.config.patch_size
        shape = (
            self.autoencoder.channels,
            size[0] // self.autoencoder.factor,
            size[1] // self.autoencoder.factor,
        )
        grid = (shape[1] // patch, shape[2] // patch)
        guided = config.guidance != 1
        text = self.text_tower.encode(prompts + [""] * count if guided else prompts)
        samples = 2 * count if guided else count
        layout = self.denoiser.layouts.layout([grid] * samples, text.cu_seqlens, text.max_seqlen)

        def velocity(x: Tensor, t: float) -> Tensor:
            tokens = patchify(x, patch).flatten(0, 1)
            doubled = tokens.repeat(2, 1) if guided else tokens
            time = torch.full((samples,), t, device=self.device)
            with torch.autocast(self.device.type, self.compute, enabled=self.compute != torch.float32):
                (out,) = self.denoiser(doubled, time, text.embeddings, layout)
            out = out.float()
            if guided:
                with_text, without = out.chunk(2)
                out = without + config.guidance * (with_text - without)
            v = self.flow.velocity(out, tokens, t)
            return unpatchify(v.unflatten(0, (count, -1)), grid, patch)

        x = self._start(first, count, shape, seed) * self.flow.config.noise_scale
        times = shift_time(torch.linspace(1, 0, config.steps + 1), self.flow.config.time_shift).tolist()
        for t, after in pairwise(times):
            v = velocity(x, t)
            ahead = x + (after - t) * v
            if config.solver == "heun" and after > 0:
                ahead = x + (after - t) * 0.5 * (v + velocity(ahead, after))
            x = ahead
        return self.autoencoder.decode(x).cpu()

    def _start(self, first: int, count: int, shape: tuple[int, int, int], seed: int) -> Tensor:
        rows = shape[0] * shape[1]
        index = torch.arange(first, first + count, device=self.device)
        offsets = torch.arange(count + 1, dtype=torch.int32, device=self.device) * rows
        noise = normal(sample_keys(seed, index, "picture"), offsets, count * rows, shape[2], rows)
        return noise.view(count, *shape)


def save_grid(pictures: Tensor, path: Path, columns: int | None = None) -> None:
    """Write pictures (N, 3, h, w) in [-1, 1] as one PNG, row by row; as square as possible by default."""
    count, _, height, width = pictures.shape
    columns = columns or min(count, max(1, round((count * height / width) ** 0.5)))
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height))
    levels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    for i, picture in enumerate(levels):
        sheet.paste(Image.fromarray(picture), ((i % columns) * width, (i // columns) * height))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
