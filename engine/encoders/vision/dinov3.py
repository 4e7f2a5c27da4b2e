"""DINOv3 vision transformer (arXiv 2508.10104): patches of 16 pixels."""

from millrace.engine.encoders.dino import VIT_B, VIT_L, DinoEntry
from millrace.engine.encoders.pretrained import NetworkSize
from millrace.engine.encoders.teacher import PublishedVision

ENTRY = DinoEntry(
    kind="dinov3",
    name="DINOv3ViT",
    classes={"dinov3_vit": "DINOv3ViTModel"},
    patch=16,
    large=PublishedVision(
        "facebook/dinov3-vitl16-pretrain-lvd1689m",
        NetworkSize(303_129_600, 2.0 * 303_129_600),
        VIT_L | {"patch_size": 16, "intermediate_size": 4096},
    ),
    base=PublishedVision(
        "facebook/dinov3-vitb16-pretrain-lvd1689m",
        NetworkSize(85_660_416, 2.0 * 85_660_416),
        VIT_B | {"patch_size": 16, "intermediate_size": 3072},
    ),
    smallest={"patch_size": 16, "intermediate_size": 64},
)
