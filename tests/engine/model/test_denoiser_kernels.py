"""The whole denoiser through its Triton kernels against the same weights through plain PyTorch.

Runs under TRITON_INTERPRET=1, where kernels run on the CPU; and on a CUDA device.
"""

import pytest
import torch
from torch import Tensor

from millrace.engine.config import Config
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.routing import routing_policy
from millrace.kernels import flow_loss
from millrace.kernels.support import registration

PAPER = {"fuse_order": "deep_dense", "mask_token": "frozen", "structured": True, "path_drop": 0.5}
ROUTES = {
    "none": {"policy": "none"},
    "tread": {"policy": "tread", "start": 1, "end": 1},
    "sprint": {"policy": "sprint", "start": 1, "end": 1},
    "sprint of the paper": {"policy": "sprint", "start": 1, "end": 1, **PAPER},
}
UNIFORM, MIXED = [(2, 4)] * 2, [(2, 4), (1, 3)]
CASES = [(name, UNIFORM) for name in ROUTES] + [(name, MIXED) for name in ("none", "tread", "sprint")]

DEVICES = pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cpu",
            marks=[
                pytest.mark.interpreter,
                pytest.mark.skipif(not registration.INTERPRETING, reason="needs TRITON_INTERPRET=1"),
            ],
        ),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ],
)


def evaluate(
    routing, grids, device, backend, dtype, geglu_backend="auto", compiled=False
) -> dict[str, Tensor]:
    """Prediction, loss and the gradient of every parameter, with inputs and weights from fixed seeds."""
    config = Config(
        model={
            "width": 32,
            "depth": 3,
            "heads": 2,
            "in_channels": 2,
            "context_dim": 8,
            "attention_backend": backend,
            "geglu_backend": geglu_backend,
        },
        routing=ROUTES[routing],
    )
    generator = torch.Generator().manual_seed(5)
    denoiser = Denoiser(config.model, config.routing)
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        torch.nn.init.normal_(tensor, std=0.2, generator=generator)
    denoiser.to(device, dtype)
    if compiled:  # as `run.compile` does it
        torch._dynamo.reset()
        for block in denoiser.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    total = sum(rows * columns for rows, columns in grids)
    clean, noise, text, t = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((total, 8), (total, 8), (3, 8), 2)
    )
    t = t.sigmoid()
    offsets = torch.tensor([0, 3, 3], dtype=torch.int32, device=device)  # the second caption is empty
    layout = denoiser.layouts.layout(grids, offsets, 3)
    span = routing_policy(config).draw(layout, 11, torch.tensor([4, 9], device=device))
    prediction = denoiser(noise, t, text, layout, span).prediction
    loss, _ = flow_loss(prediction, clean, noise, t, layout.cu_seqlens, contrastive_weight=0.05)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in denoiser.named_parameters()}
    return {"prediction": prediction.detach(), "loss": loss.detach(), **gradients}


@DEVICES
@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize(("routing", "grids"), CASES, ids=[f"{r}, {len(set(g))} grids" for r, g in CASES])
def test_kernels_compute_what_plain_pytorch_does(device, backend, routing, grids, monkeypatch):
    found = evaluate(routing, grids, device, backend, torch.float32)
    asked = []
    monkeypatch.setattr(registration, "uses_triton", lambda *of: bool(asked.append(of)))
    plain, exact = (evaluate(routing, grids, device, "reference", d) for d in (torch.float32, torch.float64))
    assert asked, "no operator asked whether to run its kernel"
    assert found.keys() == exact.keys()
    for name, wanted in exact.items():
        assert wanted is not None, f"{name} has no gradient"
        scale = wanted.abs().max().clamp_min(1e-30)
        error, same_dtype = ((x[name].double() - wanted).abs().max() / scale for x in (found, plain))
        assert error <= 2 * same_dtype + 1e-5, f"{name}: error {error:.1e}, plain FP32 {same_dtype:.1e}"


@DEVICES
def test_the_activation_of_liger_kernel_in_compiled_blocks(device, request):
    """As a configuration asks for it, and without a break in the graph."""
    request.getfixturevalue("interpreted_liger" if device == "cpu" else "liger")
    setting = "none", MIXED, device, "sdpa", torch.float32
    found, wanted = evaluate(*setting, geglu_backend="liger", compiled=True), evaluate(*setting)
    for name, exact in wanted.items():
        torch.testing.assert_close(found[name], exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
