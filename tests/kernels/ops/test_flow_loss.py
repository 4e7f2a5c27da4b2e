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
            partner = (b - 1) % len(rows) if negative is None else negative[b]
            other = targets[partner] if partner >= 0 else ()
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


@pytest.fixture
def assert_fused(assert_accurate, dtype, device):
    """`assert_accurate` as in training: the prediction alone asks for a gradient, the rest are constants."""

    def check(operation, evaluate, prediction, **constants):
        rounded = {name: value.to(device, dtype) for name, value in constants.items()}
        assert_accurate(
            lambda prediction: operation(prediction, **rounded),
            lambda prediction: evaluate(
                prediction, **{name: value.to(prediction.dtype) for name, value in rounded.items()}
            ),
            prediction=prediction,
        )

    return check


@pytest.mark.parametrize("weight", [0.0, 0.05])
@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
@pytest.mark.parametrize(
    ("lengths", "features"),
    [*CASES.values(), ((6, 2), 1500), ((1, 40), 200)],
    ids=[*CASES, "chunks", "turns"],
)
def test_the_gradient_of_the_prediction(
    lengths, features, prediction_type, weight, offsets, spans, assert_fused
):
    """Samples of several programs, and a sample that meets a negative of one row over and over."""
    cu_seqlens = offsets(*lengths)
    assert_fused(
        lambda prediction, **rest: flow_loss(
            prediction,
            **rest,
            cu_seqlens=cu_seqlens,
            contrastive_weight=weight,
            prediction_type=prediction_type,
        ),
        formula(spans(*lengths), prediction_type, weight),
        **inputs(lengths, features),
    )


@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
@pytest.mark.parametrize(
    ("lengths", "negative"),
    [((4, 4, 4), (2, 0, 0)), ((2, 5, 3), (0, 1, 2)), ((3, 0, 5), (2, 2, 0)), ((2, 5, 3), (-1, 2, -1))],
    ids=["uniform", "themselves", "empty in the middle", "none"],
)
def test_the_gradient_with_explicit_negatives(
    lengths, negative, prediction_type, offsets, spans, assert_fused, device
):
    cu_seqlens, chosen = offsets(*lengths), torch.tensor(negative, device=device)
    assert_fused(
        lambda prediction, **rest: flow_loss(
            prediction,
            **rest,
            cu_seqlens=cu_seqlens,
            contrastive_weight=0.3,
            negative=chosen,
            prediction_type=prediction_type,
        ),
        formula(spans(*lengths), prediction_type, 0.3, negative),
        **inputs(lengths, 16),
    )


def nearest_eligible(eligible):
    """The negative of each sample by walking back around the batch; -1 for none."""
    samples = len(eligible)
    found = []
    for i in range(samples):
        before = [(i - step) % samples for step in range(1, samples)]
        candidates = [j for j in before if eligible[j]] if eligible[i] else []
        found.append(candidates[0] if candidates else -1)
    return found


@pytest.mark.parametrize("eligible", itertools.product((False, True), repeat=4), ids=str)
def test_samples_that_are_not_eligible_take_no_part(eligible, offsets, spans, device):
    """All 16 masks of four samples: losses and gradients of the formula with the negatives that are left."""
    lengths = (2, 4, 3, 2)
    data = {name: value.double() for name, value in inputs(lengths, 4).items()}
    expected = data["prediction"].clone().requires_grad_()
    evaluate = formula(spans(*lengths), weight=0.4, negative=nearest_eligible(eligible))
    _, wanted = evaluate(**data | {"prediction": expected})
    given = data["prediction"].to(device).float().requires_grad_()
    rest = {name: data[name].to(device).float() for name in ("clean", "noise", "t")}
    mask = torch.tensor(eligible, device=device)
    _, got = flow_loss(given, **rest, cu_seqlens=offsets(*lengths), contrastive_weight=0.4, eligible=mask)
    towards = torch.tensor([1.0, -2.0, 0.5, 3.0])
    (got * towards.to(device)).sum().backward()
    (wanted * towards).sum().backward()
    torch.testing.assert_close(got.cpu().double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(given.grad.cpu().double(), expected.grad, rtol=1e-5, atol=1e-6)


def test_explicit_negatives_that_are_not_eligible_drop_the_term(offsets, device):
    data = {name: value.to(device) for name, value in inputs((2, 2, 2), 4).items()}
    shared = {"cu_seqlens": offsets(2, 2, 2), "contrastive_weight": 0.4}
    eligible = torch.tensor([True, True, False], device=device)
    _, got = flow_loss(**data, **shared, negative=torch.tensor([2, 0, 1], device=device), eligible=eligible)
    _, wanted = flow_loss(**data, **shared, negative=torch.tensor([-1, 0, -1], device=device))
    assert torch.equal(got, wanted)


def test_half_precision_gradients_do_not_sink_below_the_smallest_number(offsets, device):
    """1 / elements of a picture is subnormal in FP16: what forward keeps must not be divided by them."""
    data = torch.randn(3, 32, 3072, device=device).half()
    grads = []
    for dtype in (torch.float16, torch.float64):
        prediction, clean, noise = data.to(dtype, copy=True)
        _, per_sample = flow_loss(
            prediction.requires_grad_(),
            clean,
            noise,
            torch.ones(1, device=device),
            offsets(32),
            max_seqlen=32,
        )
        (grad,) = torch.autograd.grad(per_sample.sum() * 2.0**14, prediction)
        grads.append(grad.double())
    # Two roundings of FP16, of the residual and of its product.
    assert (grads[0] - grads[1]).abs().max() <= 2**-10 * grads[1].abs().max()
    assert (grads[0] - grads[1]).square().mean().sqrt() <= 2**-11 * grads[1].square().mean().sqrt()


@pytest.mark.parametrize("wanted", ["loss", "per_sample", "mean"])
def test_each_output_alone(wanted, offsets, device):
    """An output that nobody uses gives no gradient; the mean's comes with stride zero."""
    data = {name: value.to(device) for name, value in inputs((2, 5), 4).items()}
    prediction = data["prediction"].clone().requires_grad_()
    loss, per_sample = flow_loss(**data | {"prediction": prediction}, cu_seqlens=offsets(2, 5))
    output, share = {
        "loss": (loss, [1 / 28] * 7),
        "per_sample": (per_sample[1], [0.0] * 2 + [1 / 20] * 5),
        "mean": (per_sample.mean(), [1 / 16] * 2 + [1 / 40] * 5),
    }[wanted]
    output.backward()
    residual = data["prediction"] - (data["noise"] - data["clean"])
    expected = 2 * residual * torch.tensor(share, device=device)[:, None]
    torch.testing.assert_close(prediction.grad, expected)


def test_strided_inputs(offsets, device):
    """Columns of wider tensors, as a caller may cut them."""
    wide = {name: torch.randn(5, 12, device=device) for name in ("prediction", "clean", "noise")}
    t = torch.rand(2, 3, device=device)[:, 1]
    narrow = {name: value[:, 2:10] for name, value in wide.items()} | {"t": t}
    whole = {name: value.contiguous() for name, value in narrow.items()}
    shared = {"cu_seqlens": offsets(2, 3), "contrastive_weight": 0.1}
    assert torch.equal(flow_loss(**narrow, **shared)[1], flow_loss(**whole, **shared)[1])


@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
def test_registration(prediction_type, offsets, device, assert_well_registered):
    data = {name: value.to(device) for name, value in inputs((3, 0, 5), 8).items()}
    prediction = data.pop("prediction").requires_grad_()
    cu_seqlens, eligible = offsets(3, 0, 5), torch.tensor([True, False, True], device=device)

    def function(prediction):
        loss, per_sample = flow_loss(
            prediction,
            **data,
            cu_seqlens=cu_seqlens,
            contrastive_weight=0.1,
            prediction_type=prediction_type,
            max_seqlen=5,
            eligible=eligible,
        )
        return per_sample + loss

    assert_well_registered(function, prediction)


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
        ({"eligible": torch.ones(3, dtype=torch.bool)}, r"eligible has shape \(3,\), expected \(2,\)"),
        ({"backend": "fast"}, "backend is 'fast', expected one of: auto, reference, triton, cuda"),
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
