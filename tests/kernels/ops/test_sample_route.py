"""Routes: what is kept, and that it belongs to the sample."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from millrace.kernels import Route, sample_route
from millrace.kernels.support.philox import sample_keys, uniform
from millrace.kernels.support.registration import INTERPRETING

MIXED = (16, 1, 0, 9, 30)
MANY = 100 if INTERPRETING else 2000
"""Samples of a statistic; Triton's interpreter takes a tenth of a second for each."""


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
    """Inclusion of each token, and of each pair, over thousands of samples; five standard deviations."""
    samples, length = 2 * MANY, 8
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


def scores_of(seed, sample, length, device):
    return uniform(sample_keys(seed, torch.tensor([sample], device=device), "route"), length)[0].tolist()


def lowest(scores, count):
    """Sorted by score, then by place; of a list of (score, place) Python compares the first that differs."""
    return sorted(place for _, place in sorted(zip(scores, range(len(scores)), strict=True))[:count])


@pytest.mark.parametrize("keep_ratio", [0.01, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("lengths", [(700, 1, 0, 33, 4096), (1024, 1024), (20_000,)], ids=str)
def test_the_lowest_scores_stay(lengths, keep_ratio, offsets, spans, device):
    """Lengths that are a power of two and not, and one that no program holds."""
    samples = indices(len(lengths), device, start=40)
    route = sample_route(offsets(*lengths), keep_ratio, 9, samples)
    for b, kept in enumerate(kept_of(route, spans(*lengths))):
        assert kept == lowest(scores_of(9, 40 + b, lengths[b], device), len(kept))


@pytest.mark.parametrize(
    ("sample", "keep_ratio"), [(37749, 0.25), (21368, 0.5), (52446, 0.5), (26148, 0.75), (57140, 0.75)]
)
def test_equal_scores_keep_the_earlier_token(sample, keep_ratio, offsets, device):
    """Scores have 24 bits, so ties happen: these samples have one at the border of what is kept."""
    scores, count = scores_of(0, sample, 1024, device), int(1024 * keep_ratio)
    order = sorted(range(1024), key=lambda place: (scores[place], place))
    kept, dropped = order[count - 1], order[count]
    assert scores[kept] == scores[dropped]
    assert kept < dropped
    route = sample_route(offsets(1024), keep_ratio, 0, torch.tensor([sample], device=device))
    assert route.index.tolist() == sorted(order[:count])


@pytest.mark.parametrize(
    ("grid", "keep_ratio", "edge"),
    [((2, 6), 0.5, 2), ((64, 48), 0.25, 2), ((4, 12), 0.3, 4), ((36, 64), 0.875, 4)],
)
def test_the_lowest_scores_of_each_group_stay(grid, keep_ratio, edge, offsets, spans, device):
    rows, columns = grid
    length = rows * columns
    route = sample_route(offsets(length, length), keep_ratio, 9, indices(2, device), grid, structured=True)
    for b, kept in enumerate(kept_of(route, spans(length, length))):
        scores, expected = scores_of(9, b, length, device), []
        for top in range(0, rows, edge):
            for left in range(0, columns, edge):
                group = [(top + r) * columns + left + c for r in range(edge) for c in range(edge)]
                chosen = lowest([scores[token] for token in group], round(keep_ratio * edge**2))
                expected += [group[place] for place in chosen]
        assert kept == sorted(expected)


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("lengths", [(16, 16, 16), (16, 0, 9)], ids=str)
def test_no_value_is_read_back_from_the_device(lengths, structured):
    """Fake tensors have no values: asking for one raises."""
    if structured and len(set(lengths)) > 1:
        pytest.skip("structured routes need one grid")
    with FakeTensorMode():
        offsets = torch.zeros(4, dtype=torch.int32)
        route = sample_route(offsets, 0.5, 0, torch.arange(3), (4, 4), structured, lengths)
        assert route.index.shape == (sum(length - length // 2 for length in lengths),)
        assert route.index.dtype == torch.int64


@pytest.mark.parametrize(("lengths", "structured"), [((16, 16), False), ((16, 16), True), ((7, 16), False)])
def test_registration(lengths, structured, offsets, device):
    """opcheck, one graph, and the same tokens every time."""
    cu_seqlens, index = offsets(*lengths), indices(2, device)
    counts = [length - length // 2 for length in lengths]
    kept = offsets(*counts)
    edge, columns = (2, 4) if structured else (0, 0)
    torch.library.opcheck(
        torch.ops.millrace.sample_route.default,
        (sample_keys(0, index, "route"), cu_seqlens, kept, list(lengths), counts, edge, columns),
    )

    def function(cu_seqlens, index):
        route = sample_route(cu_seqlens, 0.5, 3, index, (4, 4), structured, lengths)
        return route.index, route.cu_seqlens

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, want, again in zip(*(f(cu_seqlens, index) for f in (compiled, function, function)), strict=True):
        assert torch.equal(got, want)
        assert torch.equal(again, want)


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
    samples, length = MANY, 16
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
