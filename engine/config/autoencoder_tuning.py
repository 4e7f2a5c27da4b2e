"""End-to-end tuning section of the autoencoder (REPA-E, arXiv 2504.10483).

Defaults are those of the authors' code (End2End-Diffusion/REPA-E: the arguments of `train_repae.py`, the
losses of `configs/l1_lpips_kl_gan.yaml`) where the text does not say otherwise.
"""

from typing import Any

from pydantic import Field

from millrace.engine.config.alignment import Alignment
from millrace.engine.config.section import PathText, Section


class AutoencoderTuning(Section):
    """The autoencoder learns with the denoiser: from its own losses, and from the alignment loss, which
    reaches it through the denoiser. The flow matching loss does not."""

    enabled: bool = False
    """Train the autoencoder too."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate of the autoencoder (`--vae-learning-rate`); it follows `schedule`."""
    discriminator_lr: float = Field(1e-4, gt=0)
    """Peak learning rate of the discriminator (`--disc-learning-rate`); it follows `schedule`."""
    clip: float = Field(1.0, ge=0)
    """Largest norm of the autoencoder's gradient, and of the discriminator's (`--max-grad-norm`); 0 is
    none."""
    alignment_weight: float = Field(1.5, ge=0)
    """Weight of the alignment loss in the autoencoder's update (`--vae-align-proj-coeff`); the denoiser's own
    is alignment.weight."""
    reconstruction_weight: float = Field(1.0, ge=0)
    """Weight of the mean absolute error of the pixels."""
    perceptual_weight: float = Field(1.0, ge=0)
    """Weight of LPIPS between picture and reconstruction, with the network of objective.lpips.path."""
    kl_weight: float = Field(1e-6, ge=0)
    """Weight of the divergence of the posterior from N(0, 1), summed over a picture's latents."""
    gan_weight: float = Field(0.1, ge=0)
    """Weight of -mean(discriminator(reconstruction)), constant as in the authors' code, not the adaptive one
    of VQGAN; 0 trains no discriminator."""
    gan_start: int = Field(0, ge=0)
    """Step at which the discriminator begins to learn and to count."""
    discriminator_width: int = Field(64, ge=1)
    """Channels of the discriminator's first layer."""
    discriminator_path: PathText | None = None
    """File of weights that the discriminator starts from; the authors start from the one that the autoencoder
    was trained with. Default random ones."""
    norm_momentum: float = Field(0.1, gt=0, le=1)
    """Share of a step's statistics in the running mean and variance of the latents (`--bn-momentum`)."""
    norm_eps: float = Field(1e-4, gt=0)
    """Added to the variance of the latents (`models/sit.py`)."""
    norm_samples: int = Field(1024, ge=1)
    """Samples whose latents give the first running mean and variance, rounded up to whole global batches. The
    authors take those of their whole data set."""
    activation_checkpointing: bool = False
    """Recompute the autoencoder's activations in its backward pass."""


def check_tuning(
    tuning: AutoencoderTuning,
    kind: str,
    form: str,
    lpips: str | None,
    alignment: Alignment,
    deepspeed: dict[str, Any],
) -> None:
    """Raise ValueError where tuning cannot work with the rest: `kind` and `form` of the autoencoder, the path
    `lpips` of that network, and the others."""
    if not tuning.enabled:
        return
    key = "conditioning.autoencoder.tuning"
    if kind == "pixels":
        raise ValueError(
            f"{key} trains an autoencoder, but conditioning.autoencoder.kind is pixels; set flux1"
        )
    if kind == "dc_ae":
        raise ValueError(
            f"{key} needs an autoencoder with a posterior, which dc_ae has not; set "
            "conditioning.autoencoder.kind flux1, flux2 or repa_e"
        )
    if form == "patchified":
        raise ValueError(
            f"{key} normalises the latents itself; set conditioning.autoencoder.form raw, with "
            "model.patch_size 2 for the same tokens"
        )
    if alignment.kind == "none":
        raise ValueError(
            f"{key} is driven by the alignment loss, but alignment.kind is none; set it to repa or irepa"
        )
    if alignment.until is not None:
        raise ValueError(
            f"alignment.until ends the alignment that drives {key}; remove it, and train on with the "
            "exported autoencoder in another run"
        )
    if tuning.perceptual_weight and lpips is None:
        raise ValueError(
            f"{key}.perceptual_weight needs the weights of LPIPS; set objective.lpips.path, or the weight 0"
        )
    zero = deepspeed.get("zero_optimization", {})
    if isinstance(zero, dict) and zero.get("stage") == 3:
        raise ValueError(
            f"{key} runs the denoiser's weights outside DeepSpeed, which ZeRO stage 3 has taken apart; set "
            "deepspeed.zero_optimization.stage to 2"
        )
