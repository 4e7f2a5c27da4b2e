"""Loading of frozen networks from a local folder or the hub, with errors a user can act on."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256
from millrace.engine.util.quiet_imports import quiet_imports

Settings = dict[str, Any]
"""Arguments of a network's class or of its configuration's."""


class NetworkSize(NamedTuple):
    """Size and work of a frozen network, from its shape."""

    parameters: int
    flops: float
    """Forward, of one unit of its input: a text token, a pixel of an autoencoder's encoder, a patch of a
    vision transformer. An embedding looks up and multiplies nothing."""


def import_class(package: str, name: str, key: str) -> Any:
    """Class `name` of an optional package; `key` is the setting that asked for it.

    Raises UserError with the pip line when the package is absent or too old to have the class.
    """
    try:
        with quiet_imports():
            found = getattr(importlib.import_module(package), name)
        # Their reports of unused weights fill a screen; what matters there `load_network` turns into errors.
        messages = importlib.import_module(f"{package}.utils.logging")
        messages.set_verbosity_error()
        messages.disable_progress_bar()
        return found
    except (ImportError, AttributeError):
        line = 'pip install "transformers>=5" "diffusers>=0.42"'
        raise UserError(f"{key} needs {package}.{name}, which is not installed here; {line}") from None


def name_of(kind: str, source: str, revision: str | None) -> str:
    """What logs and checkpoints call a frozen network: its kind, folder or hub id, and hub revision."""
    return f"{kind} {source}" + (f"@{revision}" if revision else "")


def load(loader: Callable[..., Any], source: str, key: str, **options: Any) -> Any:
    """`loader(source, **options)`, with unreadable weights turned into one line that names setting `key`."""
    try:
        return loader(source, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise unreadable(source, key, error) from None


def unreadable(source: str, key: str, *errors: Exception) -> UserError:
    """The first lines of loaders' `errors` about `source`, and the setting `key` that can mend it."""
    reasons = dict.fromkeys(next(iter(str(error).strip().splitlines()), repr(error)) for error in errors)
    reason = "; ".join(reason.strip(" .:") for reason in reasons)
    return UserError(
        f"cannot load {source!r}: {reason}; set {key} to a local folder or a hub id you may read"
    )


def load_network(
    loader: Callable[..., Any], source: str, key: str, device: torch.device, **options: Any
) -> torch.nn.Module:
    """A network with every weight taken from `source`, frozen, in eval mode, on `device`.

    The Hugging Face loaders fill absent weights with random ones and log a warning; here that is an error.
    Weights in `source` that the network does not have (a decoder, say) are left aside.
    """
    network, report = load(loader, source, key, output_loading_info=True, **options)
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{source!r} lacks {len(missing)} weights of {type(network).__name__}, {missing[0]!r} for one; "
            f"it holds another network, set {key} to the right one"
        )
    return network.requires_grad_(False).eval().to(device)


def weights_digest(network: torch.nn.Module) -> str:
    """Of the first values of every weight: other weights under the same name are another network."""
    first = {name: value.flatten()[:64].float().cpu() for name, value in network.state_dict().items()}
    return sha256(name.encode() + value.numpy().tobytes() for name, value in first.items())[:16]


def shape_alone(make: Callable[[], Any]) -> Any:
    """`make()` on the meta device: a network that has shapes and takes no memory."""
    return random_network(make, torch.device("meta"), torch.bfloat16)


def random_network(make: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """`make()` with its random weights made on `device` in `dtype`, frozen; generators stay as they were."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.random.fork_rng([device] if device.type == "cuda" else []):
            network = make()
    finally:
        torch.set_default_dtype(usual)
    return network.to(device, dtype).requires_grad_(False).eval()
