"""Public data sets that the configurations mean: where each is published, and the commands that make it.

    configuration ──path──▶ PUBLIC_SETS ──▶ message of a missing folder, docs/data.md

Pages and columns are those of 2026; `millrace prepare` names the columns that are there if one has changed.
"""

from os import PathLike
from pathlib import Path, PurePath
from typing import NamedTuple

from millrace.engine.util.errors import UserError


class PublicSet(NamedTuple):
    """A data set at the path that configurations have for it."""

    page: str
    """Where it is published."""
    licence: str
    """As its page states it."""
    commands: tuple[str, ...]
    """From nothing to the path, for a shell."""


HUB = "https://huggingface.co/datasets/"
_NO_RESIZE = "--resize_mode no --skip_reencode True"
_SHORT_EDGE = "--resize_mode keep_ratio --resize_only_if_bigger True --image_size"


def _from_hub(name: str, raw: str) -> str:
    return f"hf download {name} --repo-type dataset --local-dir raw/{raw}"


def _links(url_list: str, of: str, urls: str, captions: str, output: str, resize: str) -> str:
    return (
        f"img2dataset --url_list {url_list} --input_format {of} --url_col {urls} --caption_col {captions} "
        f"--output_folder {output} --output_format webdataset {resize}"
    )


PUBLIC_SETS = {
    "datasets/midjourney-v6": PublicSet(
        HUB + "Photoroom/midjourney-v6-recap",
        "see its page",
        (
            _from_hub("Photoroom/midjourney-v6-recap", "midjourney-v6-recap"),
            "millrace prepare --input raw/midjourney-v6-recap --output datasets/midjourney-v6 "
            "--resolution 1024 --upscale --caption-column gemini",
        ),
    ),
    "datasets/midjourney-v6-llava": PublicSet(
        HUB + "brivangl/midjourney-v6-llava",
        "see its page",
        (
            _from_hub("brivangl/midjourney-v6-llava", "midjourney-v6-llava"),
            "millrace prepare --input raw/midjourney-v6-llava --output datasets/midjourney-v6-llava "
            "--resolution 1024 --upscale --caption-column llava,prompt",
        ),
    ),
    "datasets/flux_generated": PublicSet(
        HUB + "lehduong/flux_generated",
        "see its page",
        (
            _from_hub("lehduong/flux_generated", "flux_generated"),
            "millrace prepare --input raw/flux_generated --output datasets/flux_generated "
            "--resolution 1024 --upscale --caption-column caption_caption",
        ),
    ),
    "datasets/flux-reason-6m": PublicSet(
        HUB + "LucasFang/FLUX-Reason-6M",
        "Apache-2.0",
        (
            _from_hub("LucasFang/FLUX-Reason-6M", "flux-reason-6m"),
            "millrace prepare --input raw/flux-reason-6m --output datasets/flux-reason-6m "
            "--resolution 1024 --upscale --caption-column caption_detail",
        ),
    ),
    "datasets/alchemist": PublicSet(
        HUB + "yandex/alchemist",
        "Apache-2.0",
        (
            _from_hub("yandex/alchemist", "alchemist"),
            _links(
                "raw/alchemist/data/alchemist_3k_final.csv",
                "csv",
                "url",
                "prompt",
                "raw/alchemist-tars",
                _NO_RESIZE,
            ),
            "millrace prepare --input raw/alchemist-tars --output datasets/alchemist "
            "--resolution 1024 --upscale",
        ),
    ),
    "datasets/pexels": PublicSet(
        HUB + "bghira/photo-concept-bucket",
        "OpenRAIL++ for the list; the photographs have Pexels' own",
        (
            _from_hub("bghira/photo-concept-bucket", "photo-concept-bucket"),
            _links(
                "raw/photo-concept-bucket/photo-concept-bucket.parquet",
                "parquet",
                "url",
                "cogvlm_caption",
                "raw/pexels-tars",
                f"{_SHORT_EDGE} 512",
            ),
            "millrace prepare --input raw/pexels-tars --output datasets/pexels "
            "--resolution 256 --patch 16 --upscale",
        ),
    ),
    "datasets/unsplash": PublicSet(
        "https://unsplash.com/data",
        "terms of the Unsplash Dataset Lite: commercial and other use, no redistribution",
        (
            "curl --location --create-dirs --output raw/unsplash.zip https://unsplash.com/data/lite/latest",
            "unzip raw/unsplash.zip 'photos.*' -d raw/unsplash",
            "img2dataset --url_list raw/unsplash/photos.*000 --input_format tsv --url_col photo_image_url "
            f"--output_folder datasets/unsplash --output_format files {_SHORT_EDGE} 1024",
            "find datasets/unsplash -name '*.json' -delete",
        ),
    ),
}
"""By path, relative to the folder that a run is started in."""


def require_published(path: str | PathLike[str] | None) -> None:
    """Raises UserError where `path` is that of a public set and nothing is there: how to get it."""
    public = PUBLIC_SETS.get(PurePath(path).as_posix()) if path else None
    if public and not Path(path or "").exists():
        raise UserError(
            f"{path}: no such folder; begin with {public.commands[0]} and go on as docs/data.md says under "
            "Public data sets, or set another path"
        )
