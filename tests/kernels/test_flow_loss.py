"""flow_loss against its equations, one sample and one row at a time."""

import itertools

import pytest
import torch

from millrace.kernels import flow_loss

CASES = {
    "one token": ((1,), 64),
    "unequal": ((2, 5, 3), 16),
    "empty in the middle": ((3, 0, 5), 12),
    "pixels": ((2, 3), 768),
    "uniform": ((4, 4, 4), 16),
}


def formula(rows, prediction_type="velocity", weight=0.0, negative=None, t_min=0.05):
    """Loss and per-sample losses; negatives by a Python loop over rows."""

    def evaluate(prediction, clean, noise, t):
        predicted, targets = [], []
        for b, s in enumerate(rows):
            if prediction_type == "velocity":
                predicted.append(prediction[s])
                targets.append(noise[s] - clean[s])
            else:
                noisy, divisor = (1 - t[b]) * clean[s] + t[b] * noise[s], max(t[b], torch.as_tensor(t_min))
                predicted.append((noisy - prediction[s]) / divisor)
                targets.append((noisy - clean[s]) / divisor)
        total, per_sample = prediction.sum() * 0, []
        for b, v in enumerate(predicted):
            other = targets[(b - 1) % len(rows) if negative is None else negative[b]]
            error = prediction.sum() * 0
            for r in range(len(v)):
                error = error + ((v[r] - targets[b][r]) ** 2).sum()
                if len(rows) > 1 and len(other):
                    error = error - weight * ((v[r] - other[r % len(other)]) ** 2).sum()
            total = total + error
            per_sample.append(error / max(v.numel(), 1))
        return total / prediction.numel(), torch.stack(per_sample)

    return evaluate


def inputs(lengths, features):
    total = sum(lengths)
    return {
        "prediction": torch.randn(total, features),
        "clean": torch.randn(total, features),
        "noise": torch.randn(total, features),
        "t": torch.rand(len(lengths)) * 0.9 + 0.1,
    }


@pytest.mark.parametrize("weight", [0.0, 0.05])
@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
@pytest.mark.parametrize(("lengths", "features"), CASES.values(), ids=CASES)
def test_matches_the_equations(lengths, features, prediction_type, weight, offsets, spans, assert_accurate):
    """Default negatives: the sample before, the last one for the first (the roll of PRX)."""
    cu_seqlens = offsets(*lengths)

    def operation(prediction, clean, noise, t):
        return flow_loss(prediction, clean, noise, t, cu_seqlens, weight, prediction_type=prediction_type)

    assert_accurate(
        operation,
        formula(spans(*lengths), prediction_type, weight),
        **inputs(lengths, features),
    )


@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
@pytest.mark.parametrize(
    ("lengths", "negative"),
    [((4, 4, 4), (2, 0, 0)), ((2, 5, 3), (1, 2, 1)), ((2, 5, 3), (0, 1, 2)), ((3, 0, 5), (2, 2, 0))],
    ids=["uniform", "unequal", "themselves", "empty in the middle"],
)
def test_explicit_negatives(lengths, negative, prediction_type, offsets, spans, assert_accurate, device):
    cu_seqlens, chosen = offsets(*lengths), torch.tensor(negative, device=device)

    def operation(prediction, clean, noise, t):
        return flow_loss(prediction, clean, noise, t, cu_seqlens, 0.3, chosen, prediction_type)

    assert_accurate(
        operation,
        formula(spans(*lengths), prediction_type, 0.3, negative),
        **inputs(lengths, 16),
    )


@pytest.mark.parametrize("lengths", [(3, 0), (0, 3), (3, 0, 2)])
def test_an_empty_negative_drops_the_term(lengths, offsets, device):
    """Sample i + 1 of an empty sample i keeps the plain loss; nothing is read from a neighbour."""
    data = {name: value.to(device) for name, value in inputs(lengths, 8).items()}
    _, plain = flow_loss(**data, cu_seqlens=offsets(*lengths))
    _, pushed = flow_loss(**data, cu_seqlens=offsets(*lengths), contrastive_weight=0.5)
    after_empty = (lengths.index(0) + 1) % len(lengths)
    assert pushed[after_empty] == plain[after_empty]
    assert plain[lengths.index(0)] == pushed[lengths.index(0)] == 0


def test_one_sample_has_no_negative(offsets, device):
    """With itself as negative the loss would shrink by (1 - weight)."""
    data = {name: value.to(device) for name, value in inputs((4,), 8).items()}
    plain, _ = flow_loss(**data, cu_seqlens=offsets(4))
    pushed, _ = flow_loss(**data, cu_seqlens=offsets(4), contrastive_weight=0.5)
    assert plain == pushed


@pytest.mark.parametrize("t_min", [0.05, 0.3])
def test_small_times_are_floored(t_min, offsets, spans, device):
    """Times 0, below, at and above the floor: the miss in x0, divided by max(t, t_min)."""
    t = torch.tensor([0.0, 0.01, t_min, 0.9], dtype=torch.float64, device=device)
    data = {name: value.double().to(device) for name, value in inputs((2, 2, 2, 2), 8).items()} | {"t": t}
    _, per_sample = flow_loss(**data, cu_seqlens=offsets(2, 2, 2, 2), prediction_type="sample", t_min=t_min)
    for b, span in enumerate(spans(2, 2, 2, 2)):
        miss = (data["clean"][span] - data["prediction"][span]) / max(t[b].item(), t_min)
        torch.testing.assert_close(per_sample[b], miss.square().mean())


def test_x_prediction_is_the_velocity_loss_of_the_velocity_it_implies(offsets, device):
    data = {name: value.double().to(device) for name, value in inputs((3, 2), 8).items()}
    time = data["t"][[0, 0, 0, 1, 1]][:, None]
    noisy = (1 - time) * data["clean"] + time * data["noise"]
    implied = data | {"prediction": (noisy - data["prediction"]) / time}
    by_sample = flow_loss(**data, cu_seqlens=offsets(3, 2), contrastive_weight=0.2, prediction_type="sample")
    by_velocity = flow_loss(**implied, cu_seqlens=offsets(3, 2), contrastive_weight=0.2)
    torch.testing.assert_close(by_sample, by_velocity)


def test_a_perfect_prediction_costs_nothing(offsets, device):
    data = {name: value.to(device) for name, value in inputs((3, 2), 8).items()}
    perfect = data | {"prediction": data["noise"] - data["clean"]}
    assert flow_loss(**perfect, cu_seqlens=offsets(3, 2))[0] == 0
    perfect = data | {"prediction": data["clean"]}
    assert flow_loss(**perfect, cu_seqlens=offsets(3, 2), prediction_type="sample")[0] == 0


def test_results_are_fp32(offsets, dtype, device):
    data = {name: value.to(device, dtype) for name, value in inputs((3, 2), 8).items()}
    loss, per_sample = flow_loss(**data, cu_seqlens=offsets(3, 2))
    assert loss.dtype == per_sample.dtype == torch.float32
    assert loss.shape == ()
    assert per_sample.shape == (2,)


@pytest.mark.parametrize(
    ("prediction_type", "given"), itertools.product(("velocity", "sample"), (4, 9, None))
)
def test_max_seqlen_only_chooses_the_path(prediction_type, given, offsets, device):
    """4 takes the uniform path; the bound 9 and None take the general one. Same values, same gradients."""
    start = {name: value.double().to(device) for name, value in inputs((4, 4), 8).items()}
    results = []
    for max_seqlen in (4, given):
        prediction = start["prediction"].clone().requires_grad_()
        loss, per_sample = flow_loss(
            **start | {"prediction": prediction},
            cu_seqlens=offsets(4, 4),
            contrastive_weight=0.1,
            prediction_type=prediction_type,
            max_seqlen=max_seqlen,
        )
        results.append((loss, per_sample, *torch.autograd.grad(loss + per_sample[1], prediction)))
    for uniform, general in zip(*results, strict=True):
        torch.testing.assert_close(uniform, general, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prediction": torch.zeros(5)}, r"prediction has shape \(5,\), expected \(T, P\)"),
        ({"clean": torch.zeros(4, 8)}, r"clean has shape \(4, 8\), expected \(5, 8\)"),
        ({"noise": torch.zeros(5, 7)}, r"noise has shape \(5, 7\), expected \(5, 8\)"),
        ({"t": torch.zeros(5)}, r"t has shape \(5,\), expected \(2,\)"),
        (
            {"cu_seqlens": torch.tensor([0, 2, 5])},
            r"cu_seqlens is \(3,\) torch.int64, expected .* torch.int32",
        ),
        ({"negative": torch.zeros(3, dtype=torch.int64)}, r"negative has shape \(3,\), expected \(2,\)"),
        ({"prediction_type": "noise"}, "prediction_type is 'noise', expected 'velocity' or 'sample'"),
    ],
)
def test_says_which_argument_is_wrong(wrong, message):
    right = {
        "prediction": torch.zeros(5, 8),
        "clean": torch.zeros(5, 8),
        "noise": torch.zeros(5, 8),
        "t": torch.zeros(2),
        "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32),
        "contrastive_weight": 0.1,
    }
    with pytest.raises(ValueError, match=message):
        flow_loss(**right | wrong)
