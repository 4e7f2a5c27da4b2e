"""Low-rank adapters of linear layers: LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353).

    LoRA   y = W x + b + s B A x
    DoRA   y = m / |W + s B A| (W x + s B A x) + b      m (N,) and the norm (N,) of each row

W (N, K) and b are frozen and keep their names. A (rank, K) and B (N, rank) begin as peft's do: A uniform in
+-1 / sqrt(K), B zero, m the norm of W's rows, so that the first forward is the model's. The norm is a
constant in the backward pass, as in section 4.3 of DoRA's paper and in peft.

A layer that holds several of diffusers' side by side has one A for all of them; rows of B and m are those of
W, so that the adapter comes apart as exactly as the weight does (`conversion.py`).

peft itself wraps a layer in a module that renames the weight (`qkv.base_layer.weight`); checkpoints, averages
and `run.init_from` go by these names. So the layers are ours and the files are peft's; tests compare the two.
There is no dropout: a block draws no random numbers, which recomputation and exact resumption rely on.
"""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.engine.config import Adapter
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.util.errors import UserError
from millrace.engine.util.randomness import Purpose
from millrace.kernels.support.keys import stream_key

DOWN, UP, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude"
"""Last parts of the names of A, B and m."""


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter; it takes the parameters of the one given.

    The factors are FP32, also where the weight is stored in BF16; autocast casts them, a few rows, in every
    forward.
    """

    def __init__(self, linear: nn.Linear, config: Adapter) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = config.scale
        outputs, inputs = linear.weight.shape

        def factor(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=linear.weight.device))

        self.lora_A, self.lora_B = factor(config.rank, inputs), factor(outputs, config.rank)
        self.lora_magnitude = factor(outputs) if config.kind == "dora" else None
        self.squares: Tensor | None = None
        """(N,) FP32, squared norms of W's rows, of DoRA; neither parameter nor buffer, made by `measure`."""

    @torch.no_grad()
    def begin(self, generator: torch.Generator) -> None:
        """Fill the factors so that the layer computes what it did without them."""
        bound = self.in_features**-0.5
        drawn = torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator)
        self.lora_A.copy_(drawn)
        self.lora_B.zero_()
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(self.weight.float().norm(dim=1))

    @torch.no_grad()
    def measure(self) -> None:
        """Take note of the norms of W's rows as they are stored from now on."""
        if self.lora_magnitude is not None:
            self.squares = self.weight.float().square().sum(1)

    def forward(self, x: Tensor) -> Tensor:
        """(T, K) -> (T, N), in autocast's dtype where that is on."""
        base, up = F.linear(x, self.weight, self.bias), self.lora_B
        if self.lora_magnitude is not None:
            factor = self.lora_magnitude / self._norms()
            product = base if self.bias is None else base - self.bias.to(base.dtype)
            # 1 is left out of the factor: in BF16 it would swallow what a step changes.
            base = torch.addcmul(base, product, (factor - 1).to(base.dtype))
            up = factor[:, None] * up
        # Added where the product is made: no second tensor of (T, N).
        return torch.addmm(base, F.linear(x, self.lora_A), up.t(), alpha=self.scale)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """(N,) FP32, norms of the rows of W + s B A, from products of rank r: W + s B A is never formed."""
        with torch.autocast(self.weight.device.type, enabled=False):
            mixed = (self.weight @ self.lora_A.to(self.weight.dtype).t()).float()
            gram = self.lora_A @ self.lora_A.t()
            cross = (mixed * self.lora_B).sum(1)
            own = ((self.lora_B @ gram) * self.lora_B).sum(1)
            return (self.squares + 2 * self.scale * cross + self.scale**2 * own).sqrt()


def add_adapter(denoiser: Denoiser, config: Adapter, seed: int | None) -> None:
    """Give the linear layers that `config.targets` names an adapter, filled from `seed`, if there is one.

    Raises UserError for a pattern that names none.
    """
    if not config.active:
        return
    linears = {name: module for name, module in denoiser.named_modules() if type(module) is nn.Linear}
    chosen = matching(config.targets, linears, "adapter.targets", "linear layer")
    generator = None if seed is None else torch.Generator().manual_seed(stream_key(seed, Purpose.ADAPTER))
    for name in sorted(chosen, key=list(linears).index):
        layer = AdaptedLinear(linears[name], config)
        parent, _, last = name.rpartition(".")
        setattr(denoiser.get_submodule(parent), last, layer)
        if generator is not None:
            layer.begin(generator)


def matching(patterns: Iterable[str], names: Iterable[str], key: str, what: str) -> set[str]:
    """The names that any pattern of setting `key` matches. Raises UserError where one matches none."""
    names, chosen = list(names), set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            some = ", ".join(dict.fromkeys((names[0], names[len(names) // 2], names[-1])))
            raise UserError(f"{key}: {pattern!r} is no {what}; names are such as {some}")
        chosen.update(found)
    return chosen


def is_factor(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's factor."""
    return name.rpartition(".")[2] in (DOWN, UP, MAGNITUDE)


def adapted_layers(names: Iterable[str]) -> list[str]:
    """Names of the linear layers that have an adapter, by those of all parameters."""
    return [name.rpartition(".")[0] for name in names if name.rpartition(".")[2] == DOWN]


@torch.no_grad()
def merged(
    weights: Iterable[tuple[str, Tensor]], factors: Mapping[str, Tensor], scale: float
) -> Iterator[tuple[str, Tensor]]:
    """The model's own parameters, with the adapter in those that have one: FP32 (N, K), the rest as given.

    Args:
        weights: (name, tensor) without the factors.
        factors: by name, on the weights' device.
        scale: of the product, `Adapter.scale`.
    """
    for name, weight in weights:
        layer, _, last = name.rpartition(".")
        if last != "weight" or f"{layer}.{DOWN}" not in factors:
            yield name, weight
            continue
        down, up = (factors[f"{layer}.{kind}"].float() for kind in (DOWN, UP))
        whole = torch.addmm(weight.float(), up, down, alpha=scale)
        magnitude = factors.get(f"{layer}.{MAGNITUDE}")
        if magnitude is not None:
            whole *= (magnitude.float() / whole.norm(dim=1))[:, None]
        yield name, whole
