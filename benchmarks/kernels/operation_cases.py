"""The cases of all operations but attention (`attention_cases.py`); what a case is: `cases.py`."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from millrace.benchmarks.kernels.accuracy import Function
from millrace.benchmarks.kernels.cases import (
    EPS,
    Build,
    Case,
    NotApplicable,
    Setting,
    Shape,
    Work,
    arithmetic_work,
    memory_work,
    moved,
)
from millrace.benchmarks.kernels.fp8_case import fp8_linear_case
from millrace.kernels import (
    add_noise,
    flow_loss,
    gated_residual,
    gated_residual_norm_modulate,
    gather_fuse,
    gather_tokens,
    geglu,
    newton_schulz,
    norm_modulate,
    sample_route,
    scatter_tokens,
)
from millrace.kernels.ops.add_noise import reference as add_noise_reference
from millrace.kernels.ops.flow_loss import reference as flow_loss_reference
from millrace.kernels.ops.gated_residual import reference as gated_residual_reference
from millrace.kernels.ops.gated_residual_norm_modulate import reference as fused_norm_reference
from millrace.kernels.ops.gather_fuse import reference as gather_fuse_reference
from millrace.kernels.ops.geglu import reference as geglu_reference
from millrace.kernels.ops.newton_schulz import reference as newton_schulz_reference
from millrace.kernels.ops.norm_modulate import reference as norm_modulate_reference
from millrace.kernels.support import cuda_library
from millrace.kernels.support.philox import sample_keys

LIGER_NORM = ("liger-kernel", "its modulated norm is an RMS norm, not a LayerNorm")
TE_NORM = ("transformer-engine", "its LayerNorm has no modulation per sample")


def norm_modulate_case(shape: Shape, setting: Setting) -> Case:
    """The norm that opens a block."""
    x, offsets, most = setting.randn(shape.rows, shape.width), setting.image_offsets(shape), shape.kept
    shift, scale = setting.modulation(shape, 0, 1)

    def reference(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return norm_modulate_reference(x, shift, scale, offsets, EPS, most)

    def ours(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return norm_modulate(x, shift, scale, offsets, EPS, most)

    vectors = moved(shift, scale)
    return Case(
        "norm_modulate",
        shape,
        {"x": x, "shift": shift, "scale": scale},
        reference,
        memory_work(moved(x) + vectors, moved(x), 3 * moved(x) + moved(scale) + vectors, moved(x, scale)),
        setting.baselines(reference) | {setting.ours(): lambda: ours},
        absent=(LIGER_NORM, TE_NORM),
    )


def gated_residual_norm_modulate_case(shape: Shape, setting: Setting) -> Case:
    """The end of the attention half, fused with the norm of the MLP half."""
    offsets, most = setting.image_offsets(shape), shape.kept
    x, branch = setting.randn(shape.rows, shape.width), setting.randn(shape.rows, shape.width)
    gate, shift, scale = setting.modulation(shape, 2, 3, 4)

    def reference(
        x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        return fused_norm_reference(x, branch, gate, shift, scale, offsets, EPS, most)

    def ours(backend: str) -> Function:
        def call(
            x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
        ) -> tuple[Tensor, Tensor]:
            return gated_residual_norm_modulate(
                x, branch, gate, shift, scale, offsets, EPS, most, backend=backend
            )

        return call

    row, vector = moved(x), moved(gate)
    # Backward reads both gradients, x' and branch, and writes the gradients of x and branch.
    work = memory_work(2 * row + 3 * vector, 2 * row, 6 * row + 5 * vector, row + 2 * vector)
    inputs = {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale}
    implementations = setting.baselines(reference) | _backends(setting, ours)
    name = "gated_residual_norm_modulate"
    return Case(name, shape, inputs, reference, work, implementations, absent=(LIGER_NORM, TE_NORM))


def gated_residual_case(shape: Shape, setting: Setting) -> Case:
    """The end of the MLP half."""
    offsets, most = setting.image_offsets(shape), shape.kept
    x, branch = setting.randn(shape.rows, shape.width), setting.randn(shape.rows, shape.width)
    (gate,) = setting.modulation(shape, 5)

    def reference(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        return gated_residual_reference(x, branch, gate, offsets, most)

    def ours(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        return gated_residual(x, branch, gate, offsets, most)

    row, vector = moved(x), moved(gate)
    # The gradient of x is that of the output, as it is.
    work = memory_work(2 * row + vector, row, 3 * row + 2 * vector, row + vector)
    inputs = {"x": x, "branch": branch, "gate": gate}
    implementations = setting.baselines(reference) | {setting.ours(): lambda: ours}
    return Case("gated_residual", shape, inputs, reference, work, implementations)


def geglu_case(shape: Shape, setting: Setting) -> Case:
    """The activation of the MLP, on the output of one projection, whose halves liger-kernel copies."""
    gate_up = setting.randn(shape.rows, 2 * shape.hidden)

    def liger() -> Function:
        from liger_kernel.ops.geglu import LigerGELUMulFunction

        return lambda gate_up: LigerGELUMulFunction.apply(*gate_up.chunk(2, dim=1))

    def transformer_engine() -> Function:
        from transformer_engine.pytorch.ops import GEGLU

        operation = GEGLU()
        return lambda gate_up: operation(gate_up)

    implementations = setting.baselines(geglu_reference) | {
        "liger-kernel": liger,
        "transformer-engine": transformer_engine,
        setting.ours(): lambda: geglu,
    }
    half = moved(gate_up) // 2
    work = memory_work(2 * half, half, 5 * half, 2 * half)
    return Case("geglu", shape, {"gate_up": gate_up}, geglu_reference, work, implementations)


def gather_tokens_case(shape: Shape, setting: Setting) -> Case:
    """The way into a routed span."""
    index, x = setting.route(shape).index, setting.randn(shape.samples * shape.tokens, shape.width)

    def reference(x: Tensor) -> Tensor:
        return x.index_select(0, index)

    def xformers() -> Function:
        from xformers.ops import index_select_cat

        return lambda x: index_select_cat([x], [index]).view(len(index), -1)

    def ours(backend: str) -> Function:
        return lambda x: gather_tokens(x, index, backend=backend)

    kept = moved(x) * len(index) // len(x)
    implementations = setting.baselines(reference) | {"xformers": xformers} | _backends(setting, ours)
    work = memory_work(kept + moved(index), kept, kept + moved(index) + moved(x), moved(index))
    return Case("gather_tokens", shape, {"x": x}, reference, work, implementations)


def scatter_tokens_case(shape: Shape, setting: Setting) -> Case:
    """TREAD's way back, into a new tensor: where the rows before it are still needed."""
    index, base = setting.route(shape).index, setting.randn(shape.samples * shape.tokens, shape.width)
    update = setting.randn(len(index), shape.width)

    def reference(base: Tensor, update: Tensor) -> Tensor:
        return base.index_copy(0, index, update)

    def ours(backend: str) -> Function:
        return lambda base, update: scatter_tokens(base, update, index, backend=backend)

    # Forward reads the rows of base that stay; backward reads the gradient once for both of its parts.
    rows = moved(base) + moved(index)
    work = memory_work(rows, moved(base), rows + moved(base) + moved(update), moved(index))
    implementations = setting.baselines(reference) | _backends(setting, ours)
    inputs = {"base": base, "update": update}
    xformers = ("xformers", "scaled_index_add adds to the rows, it does not replace them")
    return Case("scatter_tokens", shape, inputs, reference, work, implementations, absent=(xformers,))


def scatter_tokens_inplace_case(shape: Shape, setting: Setting) -> Case:
    """TREAD's way back as the model takes it, over the rows that nobody needs any more; forward alone, as its
    backward pass is that of `scatter_tokens`. Doing it twice changes nothing."""
    index, base = setting.route(shape).index, setting.randn(shape.samples * shape.tokens, shape.width)
    update = setting.randn(len(index), shape.width)

    def reference(base: Tensor, update: Tensor) -> Tensor:
        return base.index_copy_(0, index, update)

    def ours(backend: str) -> Function:
        return lambda base, update: scatter_tokens(base, update, index, inplace=True, backend=backend)

    return Case(
        "scatter_tokens_inplace",
        shape,
        {"base": base, "update": update},
        reference,
        {"forward": Work(bytes=2 * moved(update) + moved(index))},
        setting.baselines(reference) | _backends(setting, ours),
    )


def gather_fuse_case(shape: Shape, setting: Setting) -> Case:
    """SPRINT's way back."""
    index, width = setting.route(shape).index, shape.width
    inputs = {
        "dense": setting.randn(shape.samples * shape.tokens, width),
        "deep": setting.randn(len(index), width),
        "mask_token": setting.randn(width),
        "weight": setting.randn(width, 2 * width) * width**-0.5,
        "bias": setting.randn(width),
    }

    def with_index(function: Function) -> Function:
        def call(dense: Tensor, deep: Tensor, mask_token: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return function(dense, deep, index, mask_token, weight, bias)

        return call

    reference = with_index(gather_fuse_reference)
    rows = len(inputs["dense"]) + len(index)
    work = arithmetic_work(2 * rows * width**2, 4 * rows * width**2)
    implementations = setting.baselines(reference) | {setting.ours(): lambda: with_index(gather_fuse)}
    return Case("gather_fuse", shape, inputs, reference, work, implementations)


def flow_loss_case(shape: Shape, setting: Setting) -> Case:
    """The loss: of velocities with the contrastive term in latents (256 tokens), of pixels else."""
    size, offsets, most = (shape.rows, shape.features), setting.image_offsets(shape), shape.kept
    clean, noise = (torch.randn(size, device=setting.device) for _ in range(2))
    t = torch.rand(shape.samples, device=setting.device)
    weight, kind = (0.05, "velocity") if shape.features < 1024 else (0.0, "sample")

    def reference(prediction: Tensor) -> tuple[Tensor, Tensor]:
        return flow_loss_reference(
            prediction, clean, noise, t, offsets, None, weight, kind == "sample", 0.05, most
        )

    def ours(backend: str) -> Function:
        def call(prediction: Tensor) -> tuple[Tensor, Tensor]:
            return flow_loss(
                prediction, clean, noise, t, offsets, weight, None, kind, 0.05, most, backend=backend
            )

        return call

    prediction = setting.randn(*size)
    # The forward pass may leave what the backward pass needs in one tensor like the prediction.
    work = memory_work(moved(prediction, clean, noise, t), 4, 2 * moved(prediction), moved(prediction))
    implementations = setting.baselines(reference) | _backends(setting, ours)
    return Case("flow_loss", shape, {"prediction": prediction}, reference, work, implementations)


def add_noise_case(shape: Shape, setting: Setting) -> Case:
    """The path, with given noise, in FP32 as the engine calls it; nothing here needs a gradient."""
    size, offsets, most = (shape.rows, shape.features), setting.image_offsets(shape), shape.kept
    clean, noise = (torch.randn(size, device=setting.device) for _ in range(2))
    t = torch.rand(shape.samples, device=setting.device)

    def reference(clean: Tensor) -> Tensor:
        return add_noise_reference(clean, noise, t, offsets, most)

    def ours(clean: Tensor) -> Tensor:
        return add_noise(clean, noise, t, offsets, most)

    work = {"forward": Work(bytes=moved(clean, noise, t, clean))}
    implementations = setting.baselines(reference) | {setting.ours(): lambda: ours}
    return Case("add_noise", shape, {"clean": clean}, reference, work, implementations)


def sample_route_case(shape: Shape, setting: Setting) -> Case:
    """Drawing a route. Reference: the same numbers, sorted."""
    samples, tokens, kept = shape.samples, shape.tokens, shape.kept
    offsets = setting.offsets([tokens] * samples)
    samples_index = torch.arange(samples, device=setting.device)
    starts = offsets[:-1, None].long()

    def reference() -> Tensor:
        from millrace.kernels.support.philox import uniform

        scores = uniform(sample_keys(0, samples_index, "route"), tokens)
        lowest = scores.sort(dim=1, stable=True).indices[:, :kept]
        return (lowest.sort(dim=1).values + starts).flatten()

    def ours() -> Tensor:
        return sample_route(offsets, shape.keep, 0, samples_index, lengths=[tokens] * samples).index

    work = {"forward": Work(bytes=moved(offsets, samples_index) + 8 * samples * kept)}
    implementations = setting.baselines(reference) | {setting.ours(): lambda: ours}
    return Case("sample_route", shape, {}, reference, work, implementations)


def newton_schulz_case(shape: Shape, setting: Setting) -> Case:
    """Muon's orthogonalisation of the input projections of four blocks' MLPs, at the first size only: weights
    do not depend on the pictures. FLOPs are those of whole products, though two of three are symmetric."""
    rows, columns, count, steps = shape.width, 2 * shape.hidden, 4, 5
    stack = setting.randn(count, rows, columns)
    work = {"forward": Work(flops=steps * 2 * count * rows**2 * (2 * columns + rows))}
    implementations = setting.baselines(newton_schulz_reference) | {
        setting.ours(): lambda: lambda stack: newton_schulz(stack, steps, dtype=setting.dtype)
    }
    return Case("newton_schulz", shape, {"stack": stack}, newton_schulz_reference, work, implementations)


def _backends(setting: Setting, ours: Callable[[str], Function]) -> dict[str, Build]:
    """Our implementations where `millrace.kernels.support.choice` has a choice."""

    def cuda() -> Function:
        if setting.device.type != "cuda":
            raise NotApplicable("csrc needs a CUDA device")
        if not cuda_library.available():
            raise ImportError("csrc is not built: cmake -S . -B build && cmake --build build")
        return ours("cuda")

    return {setting.ours(): lambda: ours("triton"), "ours/cuda": cuda}


def _whole(shape: Shape) -> bool:
    return shape.keep == 1


def _routed(shape: Shape) -> bool:
    return shape.keep < 1


def _tread(shape: Shape) -> bool:
    return _routed(shape) and not shape.structured


def _sprint(shape: Shape) -> bool:
    return shape.structured


def _once(shape: Shape) -> bool:
    return _whole(shape) and shape.tokens not in (256, 4096)


class Operation(NamedTuple):
    """Where the cases of an operation come from."""

    build: Callable[[Shape, Setting], Case]
    applies: Callable[[Shape], bool] = lambda shape: True
    """Whether a model of this shape runs it, and it is not the same as at another shape."""


OPERATIONS = {
    "gated_residual_norm_modulate": Operation(gated_residual_norm_modulate_case),
    "norm_modulate": Operation(norm_modulate_case),
    "geglu": Operation(geglu_case),
    "gated_residual": Operation(gated_residual_case),
    "fp8_linear": Operation(fp8_linear_case),
    "gather_fuse": Operation(gather_fuse_case, _sprint),
    "flow_loss": Operation(flow_loss_case, _whole),
    "gather_tokens": Operation(gather_tokens_case, _routed),
    "scatter_tokens_inplace": Operation(scatter_tokens_inplace_case, _tread),
    "scatter_tokens": Operation(scatter_tokens_case, _tread),
    "add_noise": Operation(add_noise_case, _whole),
    "sample_route": Operation(sample_route_case, _tread),
    "newton_schulz": Operation(newton_schulz_case, _once),
}
"""Most important first, after attention."""
