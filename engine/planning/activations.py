"""Memory of one micro-batch's forward and backward, traced without data.

The denoiser, the noise and the loss run on fake tensors (shapes and dtypes, no storage) under a mode that
sees every tensor made and freed, so kept activations, temporaries between operators, recomputation and
autocast's copies of the weights are all counted, and what perceptual losses hold. What an operator allocates
inside itself is not seen.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from millrace.engine.config import Config
from millrace.engine.encoders.lpips import SMALLEST, Lpips
from millrace.engine.encoders.teacher import vision_entry
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.freezing import lay_out
from millrace.engine.model.routing import routing_policy
from millrace.engine.model.working_weights import WorkingWeights, has_working_weights

_FREE = {"mm", "addmm", "bmm", "baddbmm", "empty", "empty_like", "detach", "alias", "device"}
"""Operators that the FLOP formula covers, or that move nothing."""
_ATTENTION = ("scaled_dot_product", "varlen_attn", "rope_attention_fused")
"""In the names of attention's operators, which the FLOP formula covers too."""


@dataclass(frozen=True)
class Traced:
    """Bytes beyond weights and inputs."""

    kept: int
    """Held when forward ends."""
    peak: int
    """Most held at once, if every gradient stays from when it is made (stages 0 and 1)."""
    peak_without_gradients: int
    """Most held at once, if every gradient goes as soon as it is made (stages 2 and 3)."""
    moved: int
    """Read and written by all operators but matrix products, views, allocations and casts of the weights and
    their gradients, each operand once."""
    casts: int = 0
    """Read and written by casts of the weights' gradients to FP32, 6 bytes a parameter from BF16; without
    working copies by autocast's casts of the weights too, 6 more, and in recomputation once again. Nothing in
    FP32. Does not grow with the samples."""


class Holder(TorchDispatchMode):
    """Sums the storages that exist, from their first appearance to their end."""

    def __init__(self, known: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.held = self.peak = self.moved = self.casts = 0
        self.gradients = self.peak_without_gradients = 0
        self._weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self._seen = self._weights | {tensor.untyped_storage()._cdata for tensor in known}
        self._cast: dict[int, int] = {}
        """Bytes moved for the storages that are results of a cast."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self._note(tensor.untyped_storage())
        if inputs and not func.is_view and not _free(func.overloadpacket.__name__):
            self._move(func.overloadpacket.__name__, inputs, outputs)
        return result

    def _move(self, operator: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        size = sum(_bytes(tensor) for tensor in (*inputs, *outputs))
        if operator != "_to_copy":
            self.moved += size
        elif inputs[0].untyped_storage()._cdata in self._weights:
            self.casts += size
        else:
            self.moved += size
            self._cast[outputs[0].untyped_storage()._cdata] = size

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        self.peak_without_gradients = max(self.peak_without_gradients, self.held - self.gradients)
        weakref.finalize(storage, self._gone, key, size)

    def arrived(self, parameter: Tensor) -> None:
        """Count a parameter's gradient, which is complete."""
        storage = parameter.grad.untyped_storage()
        self.gradients += storage.nbytes()
        cast = self._cast.pop(storage._cdata, 0)
        self.moved, self.casts = self.moved - cast, self.casts + cast

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._cast.pop(key, None)
        self.held -= size


def trace(config: Config, samples: int, tokens_per_edge: int, text_tokens: int, stage: int = 0) -> Traced:
    """Trace the forward and backward of `samples` square pictures of tokens_per_edge^2 tokens each.

    Attention and the MLP's activation run as the backends that `auto` takes on a CPU: libraries that are not
    installed here keep the same tensors, and attention's plain reference cannot run without data.

    Args:
        text_tokens: of each caption.
        stage: ZeRO stage; full checkpointing at stage 3 is reentrant.
    """
    sections = {"model", "routing", "objective", "precision", "run", "adapter", "optimizer"}
    key = (config.model_dump_json(include=sections), samples, tokens_per_edge, text_tokens, stage == 3)
    if key not in _known:
        with FakeTensorMode(allow_non_fake_inputs=True):
            _known[key] = _run(config, samples, tokens_per_edge, text_tokens, stage)
    return _known[key]


_known: dict[tuple[str, int, int, int, bool], Traced] = {}
"""Traces so far, by the sections that they depend on."""


def _free(operator: str) -> bool:
    return operator in _FREE or any(part in operator for part in _ATTENTION)


def _bytes(tensor: Tensor) -> int:
    """That a pass over the tensor touches: an expanded one has fewer than elements."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _run(config: Config, samples: int, edge: int, text_tokens: int, stage: int) -> Traced:
    anywhere = {"attention_backend": "auto", "geglu_backend": "auto"}
    model, device = config.model.model_copy(update=anywhere), torch.device("cpu")
    denoiser = Denoiser(model, config.routing)
    denoiser.checkpoint_activations(config.run.activation_checkpointing, reentrant=stage == 3)
    lay_out(denoiser, config)
    parameters = list(denoiser.parameters())
    flow, features = FlowMatching(config.objective, 0), model.in_channels * model.patch_size**2
    with torch.device(device):
        offsets = torch.arange(samples + 1, dtype=torch.int32) * text_tokens
        layout = denoiser.layouts.layout([(edge, edge)] * samples, offsets, text_tokens)
        clean = torch.empty(samples * edge * edge, features)
        compute = torch.bfloat16 if config.precision.compute == "bfloat16" else torch.float32
        text = torch.empty(samples * text_tokens, model.context_dim, dtype=compute)
        index = torch.arange(samples)
    autocast = torch.autocast("cpu", compute) if compute is torch.bfloat16 else nullcontext()
    copies = WorkingWeights(denoiser, compute).copies if has_working_weights(config.precision, stage) else []
    holder = Holder([clean, text, index, offsets, *copies], parameters)
    for parameter in (p for p in parameters if p.requires_grad):
        parameter.register_post_accumulate_grad_hook(holder.arrived)
    with holder:
        with autocast:
            t = flow.time(index)
            noisy, noise = flow.noisy(clean, index, t, layout)
            span = routing_policy(config).draw(layout, 0, index)
            prediction = denoiser(noisy, t, text, layout, span).prediction
        loss = flow.loss(prediction, clean, noise, t, layout).mean()
        del prediction
        kept = holder.held
        loss.backward()
    judges, judged = _judges(config, samples, edge * model.patch_size)
    return Traced(
        kept + judges,
        holder.peak + judges,
        holder.peak_without_gradients + judges,
        holder.moved + judged,
        holder.casts,
    )


def _in_dtype(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A module made in `dtype`: `Module.to` does not convert fake tensors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(before)


def _judges(config: Config, samples: int, edge: int) -> tuple[int, int]:
    """Most bytes held at once, and bytes moved, by the networks that judge pictures of edge^2 pixels.

    LPIPS is traced. A layer of DINO keeps 34 bytes for each of its features (Korthikanti et al., arXiv
    2205.05198, section 4, without attention's logits), and moves as much twice.
    """
    lpips, dino = config.objective.lpips, config.objective.dino
    held = moved = 0
    if lpips.weight:
        network = _in_dtype(Lpips, getattr(torch, lpips.dtype)).requires_grad_(False)
        size = max(round(edge * lpips.resize), SMALLEST)
        pictures, wanted = torch.empty(2, samples, 3, size, size).unbind()
        pictures = pictures.detach().requires_grad_()
        with Holder([pictures, wanted], list(network.parameters())) as holder:
            network(pictures, wanted).sum().backward()
        held, moved = holder.peak, holder.moved
    if dino.weight:
        entry = vision_entry(dino.kind)
        shape = entry.base.shape
        kept = 34 * shape["hidden_size"] * shape["num_hidden_layers"] * (dino.size // entry.patch) ** 2
        held, moved = held + samples * kept, moved + 2 * samples * kept
    return held, moved
