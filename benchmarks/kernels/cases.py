"""Every operation of `millrace.kernels` as the model calls it: inputs, implementations, and the least work.

A case is one operation at one shape. Timing and the accuracy gate build their inputs here, so both see what
training sees: modulation as slices of the one GEMM's (B, depth * 6 * C), text keys as a slice of the one
GEMM's (S, depth * 2 * H * D), captions of unequal length, rows of a route.

Least work: every input is read once and every output written once, in bytes, where memory is the limit; the
products of the equations, in FLOPs, where arithmetic is. It belongs to the operation, not to the
implementation, so one that computes or moves more only gets a lower share of the ceiling.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.benchmarks.kernels.accuracy import Function
from millrace.kernels.ops import routing
from millrace.kernels.ops.routing import Route, kept_tokens
from millrace.kernels.support.packed import to_device
from millrace.kernels.support.registration import uses_triton

MODES = ("forward", "backward", "both")
EPS = 1e-6

Build = Callable[[], Function]
"""Imports what an implementation needs, and returns it; raises ImportError where that is not installed."""


@dataclass(frozen=True)
class Shape:
    """A batch: `samples` pictures of `tokens` tokens."""

    name: str
    tokens: int
    samples: int
    keep: float = 1.0
    """Share of the tokens that a route keeps."""
    structured: bool = False
    width: int = 1792
    heads: int = 28
    hidden: int = 6272
    features: int = 3072
    text: int = 256
    """Most text tokens of a sample."""
    ragged: bool = True
    """Captions of unequal length, half of `text` on average; else all of them full."""
    depth: int = 16
    attention_only: bool = False
    """Nothing but attention is new at this shape."""

    @property
    def kept(self) -> int:
        """Tokens of a sample that run."""
        return self.tokens if self.keep == 1 else kept_tokens(self.tokens, self.keep)

    @property
    def rows(self) -> int:
        """Packed rows that run."""
        return self.samples * self.kept

    def text_lengths(self) -> list[int]:
        """Text tokens of each sample."""
        if not self.ragged:
            return [self.text] * self.samples
        step = (self.text - 2) / max(self.samples - 1, 1)
        # A fixed permutation, so that neighbours differ.
        return [1 + round(step * (i * 7 % self.samples)) for i in range(self.samples)]


@dataclass(frozen=True)
class Work:
    """The least that an operation must do."""

    bytes: int | None = None
    flops: float | None = None


class NotApplicable(Exception):
    """An implementation cannot run this case here; the message says why, and the table shows it."""


@dataclass(frozen=True)
class Case:
    """One operation at one shape."""

    operation: str
    shape: Shape
    inputs: dict[str, Tensor]
    """Differentiable tensors by name; every implementation takes exactly these, by keyword."""
    reference: Function
    work: dict[str, Work]
    """By mode; a mode that is missing does not exist."""
    implementations: dict[str, Build]
    plain: Function | None = None
    """What sets the allowed error, if it is not `reference`."""
    absent: tuple[tuple[str, str], ...] = ()
    """Peers that do not compute this, and why."""

    @property
    def differentiable(self) -> bool:
        """Whether the operation has a backward pass."""
        return "backward" in self.work


@dataclass(frozen=True)
class Setting:
    """Where the cases live."""

    device: torch.device
    dtype: torch.dtype
    compiler: str = "inductor"
    """Backend of torch.compile."""

    def randn(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def compiled(self, function: Function) -> Build:
        """torch.compile of a function, for fixed sizes."""
        return lambda: torch.compile(function, backend=self.compiler, dynamic=False)

    def baselines(self, reference: Function) -> dict[str, Build]:
        """What every operation is compared with."""
        return {"eager": lambda: reference, "torch.compile": self.compiled(reference)}

    def ours(self, backend: str = "triton") -> str:
        """The name of our implementation: on a CPU the Triton operators are plain PyTorch."""
        plain = backend == "triton" and not uses_triton(torch.empty(0, device=self.device))
        return "ours/plain PyTorch" if plain else f"ours/{backend}"

    def modulation(self, shape: Shape, *parts: int) -> list[Tensor]:
        """Some of the six vectors (B, C) of one block, with the strides that the model gives them."""
        fused = self.randn(shape.samples, shape.depth * 6 * shape.width)
        block = fused.unflatten(1, (shape.depth, 6, shape.width)).unbind(1)[shape.depth // 2]
        return [block.unbind(1)[part] for part in parts]

    def offsets(self, lengths: list[int]) -> Tensor:
        """Lengths -> cu_seqlens (B+1,) int32."""
        return to_device(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), self.device)

    def image_offsets(self, shape: Shape) -> Tensor:
        """cu_seqlens of the rows that run."""
        return self.offsets([shape.kept] * shape.samples)

    def route(self, shape: Shape) -> Route:
        """The rows that the shape's route keeps."""
        full, samples = self.offsets([shape.tokens] * shape.samples), shape.samples
        edge = int(shape.tokens**0.5)
        index = torch.arange(samples, device=self.device)
        lengths = [shape.tokens] * samples
        grid = (edge, edge)
        return routing.sample_route(full, shape.keep, 0, index, grid, shape.structured, lengths)


def moved(*tensors: Tensor) -> int:
    """Bytes of tensors, each counted once."""
    return sum(x.numel() * x.element_size() for x in tensors)


def memory_work(reads: int, writes: int, backward: int, shared: int = 0) -> dict[str, Work]:
    """Bytes by mode.

    Args:
        reads, writes: of the forward pass.
        backward: of the backward pass.
        shared: of what both passes read, and one pass over everything would read once.
    """
    forward = reads + writes
    sizes = (forward, backward, forward + backward - shared)
    return {mode: Work(bytes=size) for mode, size in zip(MODES, sizes, strict=True)}


def arithmetic_work(forward: float, backward: float) -> dict[str, Work]:
    """FLOPs by mode."""
    sizes = (forward, backward, forward + backward)
    return {mode: Work(flops=size) for mode, size in zip(MODES, sizes, strict=True)}


def full_shapes() -> Iterator[Shape]:
    """PRX-1.2B at three picture sizes, whole and as TREAD and SPRINT leave it, most important first."""
    for tokens, samples in ((1024, 32), (256, 128), (4096, 4)):
        features = 64 if tokens == 256 else 3072
        yield Shape(f"{tokens}", tokens, samples, features=features)
        yield Shape(f"{tokens}-sprint", tokens, samples, 0.25, structured=True, features=features)
        yield Shape(f"{tokens}-tread", tokens, samples, 0.5, features=features)
    yield Shape("1024-full-text", 1024, 32, ragged=False, attention_only=True)
    yield Shape("1024-7b", 1024, 32, width=3584, hidden=12_544, attention_only=True)


def small_shapes() -> Iterator[Shape]:
    """One of each kind, small enough for a CPU."""
    sizes = {"width": 128, "heads": 2, "hidden": 64, "features": 12, "text": 6, "depth": 2}
    yield Shape("16", 16, 3, **sizes)
    yield Shape("16-sprint", 16, 3, 0.25, structured=True, **sizes)
    yield Shape("16-tread", 16, 3, 0.5, **sizes)
    yield Shape("16-full-text", 16, 3, ragged=False, attention_only=True, **sizes)
