"""The prologue's two layouts against norm and rotation written out row by row."""

import pytest
import torch

from millrace.kernels.attention.layout import key_mask
from millrace.kernels.attention.prologue import prologue

HEADS, PLACES = 3, 9
CASES = {
    "one token": ((1,), (1,), 64),
    "ragged": ((5, 2, 3), (2, 4, 1), 64),
    "no text": ((3, 2), (0, 0), 64),
    "empty samples": ((0, 4, 0), (2, 0, 0), 64),
    "uniform": ((4, 4), (3, 3), 128),
    "uniform images, ragged text": ((4, 4), (0, 3), 64),
    "several programs": ((40, 33), (35, 1), 64),
    "narrow heads": ((5, 2), (3, 1), 6),
}
ROOM = 2  # the bounds of the lengths exceed them by this in one of the tests


def formula(spans, text_spans, cos, sin, positions, padded, bounds):
    """q, k, v in the layout, from per-row arithmetic on the float inputs."""
    angle_cos, angle_sin = (t.repeat_interleave(2, dim=1) for t in (cos, sin))

    def normed(x, weight):
        return x * weight / (x.square().mean(-1, keepdim=True) + 1e-6) ** 0.5

    def rotated(x, place):
        partner = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        turn_cos, turn_sin = (t[place].to(x.dtype)[:, None] for t in (angle_cos, angle_sin))
        return x * turn_cos + partner * turn_sin

    def evaluate(qkv, text_kv, weights):
        queries, keys, values = [], [], []
        for s, u in zip(spans, text_spans, strict=True):
            text = text_kv[u] if s.start < s.stop else text_kv[u].detach()  # no query reads it
            queries.append(rotated(normed(qkv[s, 0], weights[0]), positions[s]))
            image = rotated(normed(qkv[s, 1], weights[1]), positions[s])
            keys.append(
                torch.cat(
                    (image, normed(text[:, 0], weights[2] if s.start < s.stop else weights[2].detach()))
                )
            )
            values.append(torch.cat((qkv[s, 2], text[:, 1])))
        if not padded:
            return torch.cat(queries), torch.cat(keys), torch.cat(values)
        return fill(queries, bounds[0]), fill(keys, sum(bounds)), fill(values, sum(bounds))

    return evaluate


def fill(parts, rows):
    return torch.stack([torch.cat((x, x.new_zeros(rows - len(x), *x.shape[1:]))) for x in parts])


@pytest.fixture
def case(offsets, spans, device):
    """Lengths, head_dim, layout and room -> (prologue, formula) of qkv, text_kv, weights."""

    def build(lengths, text_lengths, dim, padded, room=0):
        cos, sin = torch.randn(2, PLACES, dim // 2, device=device)
        positions = torch.randint(PLACES, (sum(lengths),), device=device)
        bounds = max(lengths) + room, max(text_lengths) + room
        rest = cos, sin, positions, offsets(*lengths), offsets(*text_lengths), *bounds, padded
        expected = formula(spans(*lengths), spans(*text_lengths), cos, sin, positions, padded, bounds)
        return lambda qkv, text_kv, weights: prologue(qkv, text_kv, *weights.unbind(0), *rest), expected

    return build


def inputs(lengths, text_lengths, dim):
    return {
        "qkv": torch.randn(sum(lengths), 3, HEADS, dim),
        "text_kv": torch.randn(sum(text_lengths), 2, HEADS, dim),
        "weights": torch.rand(3, dim) + 0.5,
    }


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize(("lengths", "text_lengths", "dim"), CASES.values(), ids=CASES)
def test_matches_the_equations(lengths, text_lengths, dim, padded, case, assert_accurate):
    """Free rows of the padded layout are zero although memory is poisoned with NaN."""
    assert_accurate(*case(lengths, text_lengths, dim, padded), **inputs(lengths, text_lengths, dim))


def test_bounds_may_exceed_the_lengths(case, assert_accurate):
    assert_accurate(*case((3, 2), (2, 4), 64, True, room=ROOM), **inputs((3, 2), (2, 4), 64))


def test_more_heads_than_a_program_takes(case, assert_accurate):
    given = inputs((3, 2), (2, 4), 64)
    wide = {name: torch.randn(x.shape[0], x.shape[1], 6, 64) for name, x in given.items() if x.dim() == 4}
    assert_accurate(*case((3, 2), (2, 4), 64, False), **given | wide)


def test_gradients_of_free_rows_are_not_read(case, device):
    """What attention leaves there, NaN say, reaches nothing."""
    operation, _ = case((3, 2), (2, 4), 64, True, room=ROOM)
    leaves = [x.to(device).requires_grad_() for x in inputs((3, 2), (2, 4), 64).values()]
    outputs = operation(*leaves)
    clean = [torch.randn_like(x) for x in outputs]
    spoilt = [x.clone() for x in clean]
    for b, (n, m) in enumerate(((3, 2), (2, 4))):
        spoilt[0][b, n:] = float("nan")
        for x in spoilt[1:]:
            x[b, n + m :] = float("nan")
    expected = torch.autograd.grad(outputs, leaves, clean, retain_graph=True)
    got = torch.autograd.grad(outputs, leaves, spoilt)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_gradients_may_have_any_strides(padded, case, device):
    """SDPA's backward pass leaves heads before rows, or an expanded gradient of a sum."""
    operation, _ = case((3, 3), (2, 2), 64, padded)
    leaves = [x.to(device).requires_grad_() for x in inputs((3, 3), (2, 2), 64).values()]
    outputs = operation(*leaves)
    heads_first = [torch.randn_like(x.transpose(-3, -2).contiguous()).transpose(-3, -2) for x in outputs]
    expanded = [torch.randn(64, device=device).expand(x.shape) for x in outputs]
    for towards in (heads_first, expanded):
        got = torch.autograd.grad(outputs, leaves, towards, retain_graph=True)
        dense = [x.contiguous() for x in towards]
        for x, y in zip(got, torch.autograd.grad(outputs, leaves, dense, retain_graph=True), strict=True):
            torch.testing.assert_close(x, y)


def test_saves_its_inputs_only(case, device):
    operation, _ = case((3, 2), (2, 4), 64, False)
    leaves = [x.to(device).requires_grad_() for x in inputs((3, 2), (2, 4), 64).values()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        operation(*leaves)
    known = {x.untyped_storage().data_ptr() for x in leaves}
    large = [x for x in saved if x.dim() >= 3]
    assert len(large) == 2
    assert all(x.untyped_storage().data_ptr() in known for x in large)


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_is_well_registered(padded, case, device, assert_well_registered):
    operation, _ = case((3, 2), (0, 4), 64, padded)
    leaves = [x.to(device).requires_grad_() for x in inputs((3, 2), (0, 4), 64).values()]
    weights = [torch.randn_like(x) for x in operation(*leaves)]

    def function(*leaves):
        return sum((x * w).sum() for x, w in zip(operation(*leaves), weights, strict=True))

    assert_well_registered(function, *leaves)


def test_key_mask(offsets, device):
    mask = key_mask(offsets(2, 0, 1), offsets(1, 0, 3), 5)
    expected = [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert mask.shape == (3, 1, 1, 5)
    assert mask[:, 0, 0].int().tolist() == expected
