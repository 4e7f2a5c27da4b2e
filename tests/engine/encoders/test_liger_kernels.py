"""liger-kernel in the text encoders: the same rows, one network at a time, and one line where it cannot run.

On the CPU its Triton kernels run in Triton's interpreter (FP32), and are compiled for Hopper (BF16).
"""

import sys

import pytest
import torch
from torch import nn

from millrace.engine.config import TextTower
from millrace.engine.encoders import liger_kernels
from millrace.engine.encoders.liger_kernels import serve
from millrace.engine.encoders.text_encoder import open_text_encoder, text_encoder_entry
from millrace.engine.encoders.text_encoders.qwen3vl import Qwen3VL
from millrace.engine.encoders.text_encoders.t5gemma import T5Gemma
from millrace.engine.util.errors import UserError
from millrace.kernels.support.compilation import Launch, compile_launch, specialisations
from millrace.kernels.support.registration import INTERPRETING

pytest.importorskip("transformers")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ENCODERS = {"t5gemma": T5Gemma, "qwen3vl": Qwen3VL}
GATES = {"t5gemma": "GeGLU", "qwen3vl": "SwiGLU"}
CAPTIONS = ["a red fox", "", "the snow at dawn runs through a fox", "a"]


def saved(kind, folder):
    """A small tower, with weights wide enough that a wrong position or a missing norm shows."""
    entry = text_encoder_entry(kind)
    entry.tiny(32, folder)
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    weights = {name: 0.3 * torch.randn_like(w) for name, w in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def opened(kind, folder, kernels):
    config = TextTower(kind=kind, path=str(folder), max_tokens=64, kernels=kernels)
    return open_text_encoder(config, 32, CPU, torch.float32)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ENCODERS)
def test_the_same_rows(kind, tmp_path, interpreted_liger):
    folder = saved(kind, tmp_path)
    served, plain = opened(kind, folder, "liger"), opened(kind, folder, "hf")
    found, wanted = served.encode(CAPTIONS), plain.encode(CAPTIONS)
    assert torch.equal(found.cu_seqlens, wanted.cu_seqlens)
    assert wanted.embeddings.std() > 0.1
    torch.testing.assert_close(found.embeddings, wanted.embeddings, rtol=1e-5, atol=1e-5)
    assert served.kernels.endswith(f"(RMSNorm, RoPE, {GATES[kind]})")
    assert plain.kernels == "transformers"


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ENCODERS)
def test_each_kernel_runs_in_every_layer(kind, tmp_path, interpreted_liger, liger, monkeypatch):
    calls = []
    for name in ("LigerRMSNormFunction", "LigerRopeFunction", "LigerGELUMulFunction", "LigerSiLUMulFunction"):
        function = getattr(liger, name)

        class Counted(function):
            kind = name

            @staticmethod
            def forward(ctx, *arguments, function=function, name=name):
                calls.append(name)
                return function.forward(ctx, *arguments)

        monkeypatch.setattr(liger, name, Counted)
    tower = opened(kind, saved(kind, tmp_path), "liger")
    tower.encode(["a fox"])
    norms = sum(type(module).__name__ == tower.served.norm for module in tower.network.modules())
    gate = {"t5gemma": "LigerGELUMulFunction", "qwen3vl": "LigerSiLUMulFunction"}[kind]
    assert {name: calls.count(name) for name in set(calls)} == {
        "LigerRMSNormFunction": norms,
        "LigerRopeFunction": 2,
        gate: 2,
    }


def tiny(kind, **others):
    shape = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    whole = ENCODERS[kind].tiny_network(shape | others).eval()
    return whole.model.encoder if kind == "t5gemma" else whole.model.language_model


@pytest.mark.parametrize("kind", ENCODERS)
def test_only_the_network_itself_changes(kind, liger):
    """Neither another network nor anything in transformers."""
    network, other = tiny(kind), tiny(kind)
    module = sys.modules[type(network).__module__]
    before = (
        dict(vars(module)),
        {name: dict(vars(c)) for name, c in vars(module).items() if isinstance(c, type)},
    )
    served = ENCODERS[kind].served
    says = serve(network, served, "auto", CUDA)
    assert says.startswith("liger-kernel ")
    assert says.endswith(f"(RMSNorm, RoPE, {GATES[kind]})")
    changed = {type(m).__name__ for m in network.modules() if "forward" in vars(m)}
    assert changed == {served.norm, served.attention, served.mlp}
    assert not any("forward" in vars(m) for m in other.modules())
    assert dict(vars(module)) == before[0]
    assert {n: dict(vars(c)) for n, c in vars(module).items() if isinstance(c, type)} == before[1]


def test_an_activation_without_a_kernel_stays(liger):
    network = tiny("qwen3vl", hidden_act="gelu")
    assert serve(network, Qwen3VL.served, "liger", CUDA).endswith("(RMSNorm, RoPE)")
    assert not any("forward" in vars(m) for m in network.modules() if type(m).__name__ == Qwen3VL.served.mlp)


@pytest.mark.parametrize(
    ("wanted", "device"), [("hf", CPU), ("hf", CUDA), ("auto", CPU)], ids=lambda value: str(value)
)
def test_transformers_own_kernels(wanted, device):
    network = tiny("t5gemma")
    assert serve(network, T5Gemma.served, wanted, device) == "transformers"
    assert not any("forward" in vars(module) for module in network.modules())


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    monkeypatch.setattr(liger_kernels, "is_importable", lambda _: False)
    line = (
        "liger-kernel is not installed here; pip install 'liger-kernel>=0.8.5' (the extra `encoders` has it)"
    )
    assert serve(nn.Module(), T5Gemma.served, "auto", CUDA) == f"transformers: {line}"
    with pytest.raises(UserError) as error:
        serve(nn.Module(), T5Gemma.served, "liger", CUDA)
    assert str(error.value) == f"conditioning.text.kernels liger: {line}, or set it to hf"


def test_a_package_that_does_not_load(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    monkeypatch.setattr(liger_kernels, "is_importable", lambda _: True)
    with pytest.raises(UserError, match=r"liger: liger-kernel does not load here: .*, or set it to hf"):
        serve(nn.Module(), T5Gemma.served, "liger", CUDA)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter runs them on the CPU")
def test_needs_cuda():
    with pytest.raises(UserError) as error:
        serve(nn.Module(), T5Gemma.served, "liger", CPU)
    assert str(error.value) == (
        "conditioning.text.kernels liger needs a CUDA device, the text encoder is on cpu; set it to auto"
    )


KERNELS = {
    "t5gemma": {"_rms_norm_forward_kernel", "_triton_rope", "_geglu_tanh_forward_kernel"},
    "qwen3vl": {"_rms_norm_forward_kernel", "_triton_rope", "_swiglu_forward_kernel"},
}
SIZES = {
    "t5gemma": T5Gemma.shape | {"num_hidden_layers": 1, "vocab_size": 50},
    # Of Qwen3 1.7B, the language model of Qwen3-VL 2B.
    "qwen3vl": {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 1, "vocab_size": 50},
}


@pytest.mark.skipif(INTERPRETING, reason="asks Triton's compiler, which its interpreter replaces")
@pytest.mark.parametrize("kind", ENCODERS)
def test_its_kernels_compile_for_hopper_once_for_all_batches(kind, liger):
    """At published widths in BF16, without spills."""
    with torch.device("meta"):
        network = tiny(kind, **SIZES[kind]).bfloat16()
    serve(network, ENCODERS[kind].served, "auto", CUDA)

    def forward(rows):
        with torch.no_grad():
            ids = torch.zeros(rows, 48, dtype=torch.int64, device="meta")
            if kind == "t5gemma":
                mask = torch.zeros(rows, 1, 1, 48, dtype=torch.bfloat16, device="meta")
                network(input_ids=ids, attention_mask={"full_attention": mask, "sliding_attention": mask})
            else:
                places = torch.arange(48, device="meta").expand(3, rows, 48)
                network(input_ids=ids, position_ids=places, use_cache=False)

    two, three = (frozenset(specialisations(Launch(kind, forward, (rows,)), 90)) for rows in (2, 3))
    assert two == three
    resources = compile_launch(Launch(kind, forward, (2,)), 90)
    assert {one.kernel for one in resources} == KERNELS[kind]
    assert {one.spill_bytes for one in resources} == {0}
