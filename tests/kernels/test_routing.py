"""Routes: what is kept, that it belongs to the sample, and the way out and back."""

import math

import pytest
import torch

from millrace.kernels import Route, gather_tokens, sample_route, scatter_tokens
from millrace.kernels import routing as routing_module

MIXED = (16, 1, 0, 9, 30)


def kept_of(route: Route, rows: list[slice]) -> list[list[int]]:
    """The kept positions of each sample, counted from its own start."""
    ends = route.cu_seqlens.tolist()
    return [
        [row - s.start for row in route.index[a:b].tolist()]
        for s, a, b in zip(rows, ends[:-1], ends[1:], strict=True)
    ]


def indices(count, device, start=0):
    return torch.arange(start, start + count, device=device)


@pytest.mark.parametrize("keep_ratio", [0.1, 0.25, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("lengths", [MIXED, (16, 16, 16), (1,), (1, 1)], ids=str)
def test_counts_and_order(lengths, keep_ratio, offsets, spans, device):
    """length - round(length * (1 - ratio)) stay, at least one stays and one goes; ascending and unique."""
    route = sample_route(offsets(*lengths), keep_ratio, 0, indices(len(lengths), device))
    kept = kept_of(route, spans(*lengths))
    for positions, length in zip(kept, lengths, strict=True):
        expected = length - round(length * (1 - keep_ratio))
        assert len(positions) == (length if length < 2 else min(max(expected, 1), length - 1))
        assert positions == sorted(set(positions))
        assert all(0 <= place < length for place in positions)
    assert route.cu_seqlens.dtype == torch.int32
    assert route.index.dtype == torch.int64
    assert len(route.index) == route.cu_seqlens[-1] == sum(len(positions) for positions in kept)
    assert route.max_seqlen == max(len(positions) for positions in kept)


def test_a_sample_keeps_its_route_in_any_batch(offsets, spans, device):
    """Alone, between others, with lengths told or read, on the uniform and the mixed path."""
    lengths, samples = (16, 30, 16), [5, 901, 7]
    sample_index = torch.tensor(samples, device=device)
    together = kept_of(sample_route(offsets(*lengths), 0.5, 3, sample_index), spans(*lengths))
    told = sample_route(offsets(*lengths), 0.5, 3, sample_index, lengths=lengths)
    assert kept_of(told, spans(*lengths)) == together
    for place, (length, index) in enumerate(zip(lengths, samples, strict=True)):
        alone = sample_route(offsets(length), 0.5, 3, torch.tensor([index], device=device))
        assert kept_of(alone, spans(length))[0] == together[place]
    uniform = sample_route(offsets(16, 16), 0.5, 3, torch.tensor([7, 5], device=device))
    assert kept_of(uniform, spans(16, 16)) == [together[2], together[0]]


def test_routes_differ_by_seed_and_sample(offsets, spans, device):
    lengths = (32,) * 50
    first = kept_of(sample_route(offsets(*lengths), 0.5, 0, indices(50, device)), spans(*lengths))
    second = kept_of(sample_route(offsets(*lengths), 0.5, 1, indices(50, device)), spans(*lengths))
    assert len({tuple(kept) for kept in first + second}) == 100


@pytest.mark.parametrize("keep_ratio", [0.25, 0.5])
def test_every_subset_is_as_likely_as_any_other(keep_ratio, offsets, device):
    """Inclusion of each token, and of each pair, over 4000 samples; five standard deviations."""
    samples, length = 4000, 8
    route = sample_route(offsets(*[length] * samples), keep_ratio, 0, indices(samples, device))
    chosen = torch.zeros(samples * length, device=device)
    chosen[route.index] = 1
    chosen = chosen.view(samples, length)
    kept = route.max_seqlen
    single, pair = kept / length, kept * (kept - 1) / (length * (length - 1))
    frequency = chosen.T @ chosen / samples
    for i in range(length):
        for j in range(length):
            share = single if i == j else pair
            assert abs(frequency[i, j].item() - share) < 5 * math.sqrt(share * (1 - share) / samples)


def test_equal_scores_keep_the_earlier_token(offsets, spans, device, monkeypatch):
    """Scores have 24 bits, so ties happen; how they break must not depend on device or batch."""
    monkeypatch.setattr(
        routing_module, "uniform", lambda keys, count: torch.zeros(len(keys), count).to(keys.device)
    )
    for lengths in ((500, 500), (500, 300)):
        route = sample_route(offsets(*lengths), 0.5, 0, indices(2, device))
        assert kept_of(route, spans(*lengths)) == [list(range(n // 2)) for n in lengths]


@pytest.mark.parametrize(
    ("grid", "keep_ratio", "edge", "per_group"),
    [
        ((4, 8), 0.25, 2, 1),
        ((8, 4), 0.5, 2, 2),
        ((8, 8), 0.75, 2, 3),
        ((8, 4), 0.125, 4, 2),
        ((4, 12), 0.3, 4, 5),
    ],
)
def test_structured_routes_keep_as_many_in_each_group(
    grid, keep_ratio, edge, per_group, offsets, spans, device
):
    rows, columns = grid
    lengths = (rows * columns,) * 20
    route = sample_route(offsets(*lengths), keep_ratio, 0, indices(20, device), grid, structured=True)
    for positions in kept_of(route, spans(*lengths)):
        assert positions == sorted(set(positions))
        groups = [(place // columns // edge, place % columns // edge) for place in positions]
        every = [(r, c) for r in range(rows // edge) for c in range(columns // edge)]
        assert {group: groups.count(group) for group in every} == dict.fromkeys(every, per_group)
    assert route.max_seqlen == per_group * rows * columns // edge**2
    assert route.cu_seqlens.tolist() == [route.max_seqlen * b for b in range(21)]


def test_structured_routes_choose_evenly_within_a_group(offsets, device):
    samples, length = 2000, 16
    route = sample_route(
        offsets(*[length] * samples), 0.25, 0, indices(samples, device), (4, 4), structured=True
    )
    share = torch.bincount(route.index % length, minlength=length) / samples
    assert (share - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / samples)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio is 0.0, expected a number between 0 and 1"),
        ({"keep_ratio": 1.0}, "keep_ratio is 1.0, expected a number between 0 and 1"),
        ({"sample_index": torch.arange(3)}, r"sample_index has shape \(3,\), expected \(2,\)"),
        (
            {"cu_seqlens": torch.tensor([0, 16, 32])},
            r"cu_seqlens is \(3,\) torch.int64, expected .* torch.int32",
        ),
        ({"lengths": [16]}, "lengths has 1 entries, expected 2"),
        ({"structured": True}, "grid is None, expected rows and columns of 16 tokens divisible by 2"),
        ({"structured": True, "grid": (2, 4)}, r"grid is \(2, 4\), expected rows and columns of 16 tokens"),
        ({"structured": True, "grid": (1, 16)}, r"grid is \(1, 16\), expected .* divisible by 2"),
        (
            {"structured": True, "grid": (8, 2), "keep_ratio": 0.3},
            r"grid is \(8, 2\), expected .* divisible by 4",
        ),
        (
            {"structured": True, "grid": (4, 4), "keep_ratio": 0.01},
            "keep_ratio is 0.01, which keeps no or all tokens of a 4 x 4 group",
        ),
        (
            {"structured": True, "grid": (4, 4), "cu_seqlens": torch.tensor([0, 16, 20], dtype=torch.int32)},
            r"lengths are \[16, 4\], expected equal ones",
        ),
    ],
)
def test_says_which_argument_of_a_route_is_wrong(wrong, message):
    right = {
        "cu_seqlens": torch.tensor([0, 16, 32], dtype=torch.int32),
        "keep_ratio": 0.5,
        "seed": 0,
        "sample_index": torch.arange(2),
    }
    with pytest.raises(ValueError, match=message):
        sample_route(**right | wrong)


def gather_formula(rows):
    return lambda x: torch.stack([x[row] for row in rows]) if rows else x[:0]


def scatter_formula(rows):
    def evaluate(base, update):
        place = {row: k for k, row in enumerate(rows)}
        return torch.stack([update[place[i]] if i in place else base[i] for i in range(len(base))])

    return evaluate


@pytest.mark.parametrize("rows", [[0, 2, 3, 6], [4], [], list(range(7))], ids=str)
@pytest.mark.parametrize("width", [8, 1792])
def test_out_and_back(rows, width, assert_accurate, device):
    """Some rows, one, none (an empty route) and all of them; gradients go where the values came from."""
    index = torch.tensor(rows, dtype=torch.int64, device=device)
    assert_accurate(lambda x: gather_tokens(x, index), gather_formula(rows), x=torch.randn(7, width))
    assert_accurate(
        lambda base, update: scatter_tokens(base, update, index),
        scatter_formula(rows),
        base=torch.randn(7, width),
        update=torch.randn(len(rows), width),
    )


def test_moving_rows_changes_no_bit(dtype, device):
    x = torch.randn(6, 16, device=device).to(dtype)
    index = torch.tensor([1, 4, 5], device=device)
    taken = gather_tokens(x, index)
    assert torch.equal(taken, x[[1, 4, 5]])
    assert torch.equal(scatter_tokens(x, taken, index), x)
    assert torch.equal(scatter_tokens(torch.zeros_like(x), taken, index)[[1, 4, 5]], taken)


def test_scatter_leaves_its_arguments_alone_and_keeps_their_dtype(device):
    base = torch.zeros(3, 4, dtype=torch.bfloat16, device=device)
    out = scatter_tokens(base, torch.ones(1, 4, device=device), torch.tensor([1], device=device))
    assert out.dtype == torch.bfloat16
    assert base.eq(0).all()
    assert out[:, 0].tolist() == [0, 1, 0]


def test_strided_rows(assert_accurate, device):
    index = torch.tensor([0, 2], device=device)
    assert_accurate(
        lambda wide: gather_tokens(wide[:, 4:8], index),
        lambda wide: torch.stack((wide[0, 4:8], wide[2, 4:8])),
        wide=torch.randn(3, 12),
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"base": torch.zeros(6)}, r"base has shape \(6,\), expected \(T, C\)"),
        ({"update": torch.zeros(3, 4)}, r"update has shape \(3, 4\), expected \(2, 4\)"),
        ({"update": torch.zeros(2, 5)}, r"update has shape \(2, 5\), expected \(2, 4\)"),
        ({"index": torch.zeros(2, 1, dtype=torch.int64)}, r"index has shape \(2, 1\), expected \(K,\)"),
    ],
)
def test_says_which_argument_of_scatter_is_wrong(wrong, message):
    right = {"base": torch.zeros(6, 4), "update": torch.zeros(2, 4), "index": torch.tensor([1, 3])}
    with pytest.raises(ValueError, match=message):
        scatter_tokens(**right | wrong)


def test_says_which_argument_of_gather_is_wrong():
    with pytest.raises(ValueError, match=r"x has shape \(6,\), expected \(T, C\)"):
        gather_tokens(torch.zeros(6), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"index has shape \(1, 1\), expected \(K,\)"):
        gather_tokens(torch.zeros(6, 4), torch.tensor([[1]]))
