"""Finding and loading the CUDA library, and what its functions say of arguments. Its numbers: tests/csrc."""

import pytest
import torch

from millrace.kernels.support import cuda_library


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A package folder without a library, in a repository without a build; nothing loaded, nothing named."""
    package = tmp_path / "repository" / "kernels"
    package.mkdir(parents=True)
    monkeypatch.delenv("MILLRACE_LIBRARY", raising=False)
    monkeypatch.setattr(cuda_library, "__file__", str(package / "support" / "cuda_library.py"))
    for cached in (cuda_library._operators, cuda_library.available):
        cached.cache_clear()
    yield package
    for cached in (cuda_library._operators, cuda_library.available):
        cached.cache_clear()


def rows(dtype=torch.bfloat16, width=16):
    return torch.zeros(3, width, dtype=dtype)


def forward(x):
    vectors = torch.zeros(1, x.shape[1], dtype=x.dtype)
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
    return cuda_library.gated_residual_norm_modulate(x, x, vectors, vectors, vectors, cu_seqlens, 1e-6)


def test_says_how_to_build_what_is_missing(installed):
    assert cuda_library.library_path() is None
    assert not cuda_library.available()
    with pytest.raises(
        RuntimeError, match=r"needs libmillrace_cuda\.so.*cmake -S \. -B build && cmake --build"
    ):
        cuda_library._operators()


def test_the_order_of_places(installed, monkeypatch, tmp_path):
    built = installed.parent / "build" / cuda_library.LIBRARY
    built.parent.mkdir()
    for place in (built, installed / cuda_library.LIBRARY):
        place.touch()
        assert cuda_library.library_path() == place
    named = tmp_path / "elsewhere.so"
    monkeypatch.setenv("MILLRACE_LIBRARY", str(named))
    with pytest.raises(RuntimeError, match=r"MILLRACE_LIBRARY is .*elsewhere\.so, which is no file"):
        cuda_library.library_path()
    named.touch()
    assert cuda_library.library_path() == named


def test_a_broken_library_is_not_available(installed):
    place = installed / cuda_library.LIBRARY
    place.write_bytes(b"not a library")
    assert not cuda_library.available()
    with pytest.raises(RuntimeError, match=r"libmillrace_cuda\.so cannot be loaded into PyTorch"):
        cuda_library._operators()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: forward(rows()), 'x is on cpu, and backend "cuda" takes CUDA tensors'),
        (lambda: forward(rows(torch.float64)), "x is torch.float64, .* float32, bfloat16 or float16"),
        (lambda: forward(rows(width=12)), "rows of 12 torch.bfloat16, .* multiples of 8 and at most 4096"),
        (lambda: forward(rows(width=4104)), "rows of 4104 torch.bfloat16"),
        (lambda: cuda_library.gather_rows(rows(), torch.tensor([0])), "x is on cpu"),
        (lambda: cuda_library.scatter_rows(rows(), rows(), torch.tensor([0, 1, 2])), "base is on cpu"),
    ],
)
def test_says_which_argument_it_cannot_take(call, message):
    with pytest.raises(ValueError, match=message):
        call()
