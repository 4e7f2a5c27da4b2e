"""Autocast, as operations ask for it that cast their arguments themselves."""

import torch

_DEVICES = ("cpu", "cuda")


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on a type of device ("cpu", "cuda", ...), or None where it is off.

    `torch.is_autocast_enabled` raises for "meta". `torch.amp.is_autocast_available` would say so, but Dynamo
    cannot trace it in torch 2.11, and each call would break the compiled graph.
    """
    if device not in _DEVICES or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
