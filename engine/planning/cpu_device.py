"""The processor at hand as a device: its cores and its memory are shared by the processes on it."""

import time
from collections.abc import Callable

import psutil
import torch

from millrace.engine.planning.devices import Device, Hierarchy, Link

_ROUNDS = 5
_EDGE = 768
_COPIED = 2**25


def this_machine(processes: int) -> Device:
    """One of `processes` on this machine: products and copies are timed now, in about a second.

    Each process gets its share of the rates that all cores together reach; what crosses between processes is
    copied through memory twice.
    """
    left, right = torch.randn(2, _EDGE, _EDGE).unbind()
    source, target = torch.randn(2, _COPIED // 4).unbind()
    products = 2 * _EDGE**3 / _fastest(lambda: torch.mm(left, right)) / processes
    copies = 2 * source.nbytes / _fastest(lambda: target.copy_(source)) / processes
    link = Link(copies / 2, 1e-4)
    return Device(
        name="processor of this machine",
        product_flops=products,
        copy_bandwidth=copies,
        memory=psutil.virtual_memory().available / processes,
        network=Hierarchy(processes, link, link),
        fused_optimizer=False,
        overlaps=False,
        assumed=(),
    )


def _fastest(call: Callable[[], object]) -> float:
    """Least seconds of a call: what else runs on the machine only adds to it."""
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
