"""Hugging Face hub: weights fetched by the name of their repository, a folder pushed to one."""

import re
from pathlib import Path

from millrace.engine.util.errors import UserError
from millrace.engine.util.quiet_imports import quiet_imports

_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?")
_WEIGHTS = ("model_index.json", "config.json", "denoiser.safetensors", "diffusion_pytorch_model*")
_PATTERNS = [*_WEIGHTS, "transformer/*"]
"""Files of a repository that hold a denoiser; a pipeline's frozen networks stay where they are."""


def is_hub_name(text: str | Path) -> bool:
    """Whether `text` is written as a repository, `OWNER/NAME` or `OWNER/NAME@REVISION`."""
    return _NAME.fullmatch(str(text)) is not None


def local_weights(path: str | Path) -> Path:
    """`path` where there is something, else the folder with the weights of the repository of that name.

    Raises UserError where it can be neither: one line.
    """
    if Path(path).exists() or not is_hub_name(path):
        return Path(path)
    name, _, revision = str(path).partition("@")
    try:
        with quiet_imports():
            from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{path}: no such file or folder; for a repository of the hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_PATTERNS))
    except Exception as error:  # of its client, of the network, of the disk
        raise UserError(
            f"{path}: no such file or folder here, and not to be had from the hub: {_first_line(error)}"
        ) from None


def push_folder(folder: str | Path, name: str, message: str) -> str:
    """Upload a folder as the repository `OWNER/NAME`, which is created, private, where it is not there;
    returns its address. Raises UserError: one line."""
    try:
        with quiet_imports():
            from huggingface_hub import HfApi
    except ImportError:
        raise UserError(f"--push {name}: pip install huggingface_hub") from None
    api = HfApi()
    try:
        address = str(api.create_repo(name, private=True, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except Exception as error:
        raise UserError(
            f"--push {name}: {_first_line(error)}; log in with `hf auth login`; the export is in {folder}"
        ) from None
    return address


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error)).rstrip(".")
