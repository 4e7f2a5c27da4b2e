"""Random numbers: Philox against published vectors and a second implementation, and what draws promise."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from millrace.kernels.support import philox as philox_module
from millrace.kernels.support.keys import hash_key, stream_key
from millrace.kernels.support.philox import normal, philox, sample_keys, uniform

WORD = 0xFFFFFFFF


def philox_in_integers(counter, key):
    """Philox-4x32-10 of Salmon et al. (SC 2011), four counter words and two key words, in Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & WORD, (first >> 32) ^ c3 ^ k1, first & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def words_of(value):
    return value & WORD, (value >> 32) & WORD


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_second_implementation_gives_the_known_answers(counter, key, expected):
    """The known-answer vectors of Random123. Two of them set counter words that `philox` leaves at 0."""
    assert philox_in_integers(counter, key) == expected


def test_philox_gives_the_known_answer(device):
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    assert [int(word) for word in philox(zero, zero)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_philox_equals_the_second_implementation(device):
    """All 64 bits of key and counter count, negative int64 included."""
    values = [0, 1, WORD, WORD + 1, 2**62 + 12345, 2**63 - 1, -1, -(2**63), -987654321, 0x243F6A8885A308D3]
    keys = torch.tensor(values, device=device)
    got = torch.stack(philox(keys[:, None], keys[None]), -1)
    for i, key in enumerate(values):
        for j, counter in enumerate(values):
            expected = philox_in_integers((*words_of(counter), 0, 0), words_of(key))
            assert tuple(got[i, j].tolist()) == expected


def test_hash_is_splitmix64():
    """The first outputs of the generator with seed 1234567: state n is seed + n * golden ratio."""
    golden = 0x9E3779B97F4A7C15
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [hash_key(1234567 + n * golden) for n in range(4)] == expected
    assert hash_key(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("seed", [0, 42, 2**63 - 1])
def test_sample_keys_are_the_hash_of_stream_and_index(seed, device):
    """Host (`hash_key`) and device (`sample_keys`) agree, so both kinds of choice share one key."""
    index = [0, 1, 255, 2**31, 2**40 + 7, 2**62]
    keys = sample_keys(seed, torch.tensor(index, device=device), "noise")
    assert keys.dtype == torch.int64
    assert [key & (2**64 - 1) for key in keys.tolist()] == [
        hash_key(stream_key(seed, "noise") ^ i) for i in index
    ]


def test_keys_differ_by_seed_purpose_and_sample():
    index = torch.arange(1000)
    keys = [sample_keys(seed, index, purpose) for seed in (0, 1, 2) for purpose in ("noise", "time", "route")]
    assert torch.cat(keys).unique().numel() == 9000


@pytest.mark.parametrize(("samples", "count"), [(1, 1), (32, 3), (300, 5), (7, 0), (0, 4)])
def test_draws_are_well_registered(samples, count, device):
    """opcheck, one graph, strided keys, and the same numbers as the plain PyTorch that FP64 operators get."""
    index = torch.arange(2 * samples, device=device)[::2] * 10**15 - 7
    keys = sample_keys(3, index, "time")
    assert torch.equal(keys, philox_module._keys_eager(index, philox_module._signed(stream_key(3, "time"))))
    assert torch.equal(uniform(keys, count), philox_module._uniform_eager(keys, count))
    torch.library.opcheck(torch.ops.millrace.sample_keys.default, (index, -5))
    torch.library.opcheck(torch.ops.millrace.uniform.default, (keys, count))

    def draw(index):
        return uniform(sample_keys(3, index, "time"), count)

    torch._dynamo.reset()
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(index), draw(index))


class _Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("count", [1, 3])
def test_a_draw_is_two_operators(count, device):
    """Each is one kernel on CUDA, where a chain of elementwise ones would be 200 launches."""
    index = torch.arange(32, device=device)
    with _Count() as counted:
        uniform(sample_keys(0, index, "time"), count)
    assert counted.calls == 2


def expected_uniform(word):
    """The sign-folded conversion of triton.language.uint_to_uniform_float: 31 bits over 2^31."""
    return (word if word < 2**31 else 2**32 - 1 - word) / 2**31


def test_uniform_values(device):
    keys = torch.tensor([5, -7], device=device)
    got = uniform(keys, 10)
    assert got.shape == (2, 10)
    assert got.dtype == torch.float32
    for b, key in enumerate((5, -7)):
        words = [w for counter in range(3) for w in philox_in_integers((counter, 0, 0, 0), words_of(key))]
        expected = torch.tensor([expected_uniform(w) for w in words[:10]], device=device)
        torch.testing.assert_close(got[b], expected, rtol=3e-7, atol=0)


def test_uniform_lies_in_the_half_open_interval_and_is_even(device):
    """Mean, variance and ten bins of 2e5 numbers, each within five standard deviations."""
    draws = uniform(sample_keys(3, torch.arange(200, device=device), "time"), 1000).double().flatten()
    count = draws.numel()
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 5 * math.sqrt(1 / 12 / count)
    assert abs(draws.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / count)
    bins = torch.histc(draws.cpu(), 10, 0, 1)
    assert (bins - count / 10).abs().max() < 5 * math.sqrt(count * 0.09)


def test_uniform_does_not_depend_on_how_many_are_drawn(device):
    keys = torch.arange(3, device=device)
    assert torch.equal(uniform(keys, 9), uniform(keys, 100)[:, :9])


@pytest.mark.parametrize("features", [1, 4, 7, 12])
def test_normal_values(features, device, offsets):
    """Box-Muller in float64 from the second implementation; row r uses counters r * ceil(P / 4) onwards."""
    keys, lengths, calls = [11, -3, 8], [2, 0, 3], math.ceil(features / 4)
    got = normal(torch.tensor(keys, device=device), offsets(*lengths), 5, features)
    rows = []
    for key, length in zip(keys, lengths, strict=True):
        for r in range(length):
            row = []
            for counter in range(r * calls, (r + 1) * calls):
                u = [expected_uniform(w) for w in philox_in_integers((counter, 0, 0, 0), words_of(key))]
                for u1, u2 in ((u[0], u[1]), (u[2], u[3])):
                    radius = math.sqrt(-2 * math.log(u1))
                    row += [radius * math.cos(2 * math.pi * u2), radius * math.sin(2 * math.pi * u2)]
            rows.append(row[:features])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(rows, device=device), rtol=1e-5, atol=2e-6)


def test_normal_moments(device, offsets):
    """The first four moments of 1e5 numbers, within five standard deviations of their estimates."""
    keys = sample_keys(0, torch.arange(10, device=device), "noise")
    draws = normal(keys, offsets(*[100] * 10), 1000, 100).double()
    count = draws.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(draws.pow(power).mean() - moment) < 5 * math.sqrt(variance / count)
    beyond_two = (draws.abs() > 2).double().mean()
    share = math.erfc(math.sqrt(2))
    assert abs(beyond_two - share) < 5 * math.sqrt(share * (1 - share) / count)


def test_normal_neighbours_are_uncorrelated(device, offsets):
    """Along columns, along rows, and between samples of neighbouring index."""
    keys = sample_keys(0, torch.arange(4, device=device), "noise")
    x = normal(keys, offsets(*[100] * 4), 400, 64).double().view(4, 100, 64)
    for a, b in ((x[..., 1:], x[..., :-1]), (x[:, 1:], x[:, :-1]), (x[1:], x[:-1])):
        assert abs((a * b).mean()) < 5 / math.sqrt(a.numel())


def test_normal_does_not_depend_on_the_batch(device, offsets):
    """A sample draws the same alone, in a mixed batch, in another order, and on the uniform path."""
    keys = sample_keys(1, torch.arange(3, device=device), "noise")
    mixed = normal(keys, offsets(4, 2, 4), 10, 6)
    alone = normal(keys[2:], offsets(4), 4, 6, max_seqlen=4)
    turned = normal(keys[[2, 0]], offsets(4, 4), 8, 6, max_seqlen=4)
    assert torch.equal(mixed[6:], alone)
    assert torch.equal(turned, torch.cat((mixed[6:], mixed[:4])))
    assert torch.equal(normal(keys, offsets(4, 2, 4), 10, 6, max_seqlen=7), mixed)


def test_normal_of_a_prefix_is_a_prefix(device, offsets):
    """A sample with fewer rows draws the first rows of a longer one."""
    key = torch.tensor([9], device=device)
    assert torch.equal(normal(key, offsets(3), 3, 5), normal(key, offsets(8), 8, 5)[:3])


def test_says_which_argument_is_wrong():
    keys, cu_seqlens = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"keys has shape \(3,\), expected \(2,\)"):
        normal(keys, cu_seqlens, 5, 4)
    with pytest.raises(ValueError, match=r"cu_seqlens is \(3,\) torch.int64, expected .* torch.int32"):
        normal(keys[:2], cu_seqlens.long(), 5, 4)
    with pytest.raises(ValueError, match=r"keys has shape \(3, 1\), expected \(B,\)"):
        uniform(keys[:, None])
