"""DINOv2 vision transformer (arXiv 2304.07193), with registers (arXiv 2309.16588): patches of 14 pixels."""

from millrace.engine.encoders.dino import VIT_B, VIT_L, DinoEntry
from millrace.engine.encoders.pretrained import NetworkSize, Settings
from millrace.engine.encoders.teacher import PublishedVision

_OWN: Settings = {"patch_size": 14, "image_size": 518, "mlp_ratio": 4}

ENTRY = DinoEntry(
    kind="dinov2",
    name="Dinov2WithRegisters",
    classes={"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"},
    patch=14,
    large=PublishedVision(
        "facebook/dinov2-with-registers-large",  # the one that Photoroom/PRX aligns with
        NetworkSize(304_372_736, 2.0 * 304_372_736),
        VIT_L | _OWN,
    ),
    base=PublishedVision(
        "facebook/dinov2-with-registers-base",
        NetworkSize(86_583_552, 2.0 * 86_583_552),
        VIT_B | _OWN,
    ),
    # The published ones were trained on 37 x 37 patches; other sizes interpolate their positions.
    smallest={"patch_size": 14, "image_size": 56, "mlp_ratio": 2},
)
