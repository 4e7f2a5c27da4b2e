"""The libraries of csrc, built once a session, and how a test finds the compilers."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CXX = shutil.which(os.environ.get("CXX", "g++"))
NVCC = shutil.which("nvcc")
CMAKE = shutil.which("cmake") if shutil.which("ninja") or shutil.which("make") else None
GENERATOR = ["-G", "Ninja"] if shutil.which("ninja") else []


def run_command(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def run() -> Callable[..., str]:
    """Run a command, which must succeed, and return what it printed."""
    return run_command


@pytest.fixture(scope="session")
def cxx() -> str:
    """The C++ compiler."""
    return CXX or pytest.skip("no C++ compiler found (g++, or what $CXX names)")


@pytest.fixture(scope="session")
def nvcc() -> str:
    """The CUDA compiler."""
    return NVCC or pytest.skip("nvcc not found")


@pytest.fixture(scope="session")
def _build(cxx, tmp_path_factory) -> tuple[Path, str]:
    """The build folder and what the build printed; with the kernels where there is nvcc."""
    if CMAKE is None:
        pytest.skip("needs cmake with ninja or make")
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent  # of all workers: the first that comes builds
    folder, said = session / "csrc", session / "csrc.log"
    with open(session / "csrc.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            said.write_text(_built(folder))
    return folder, said.read_text()


def _built(folder: Path) -> str:
    cuda = [f"-DCMAKE_CUDA_COMPILER={NVCC}"] if NVCC else ["-DMILLRACE_CUDA=OFF"]
    torch_folder = Path(torch.__file__).parent
    run_command(CMAKE, "-S", ROOT, "-B", folder, *GENERATOR, *cuda, f"-DMILLRACE_TORCH_DIR={torch_folder}")
    return run_command(CMAKE, "--build", folder, "--parallel", "2")


@pytest.fixture(scope="session")
def host_library(_build) -> Path:
    """libmillrace_host.so, its operators loaded as torch.ops.millrace_host."""
    path = _build[0] / "libmillrace_host.so"
    torch.ops.load_library(path)
    return path


@pytest.fixture(scope="session")
def cuda_library_path(_build, nvcc) -> Path:
    """libmillrace_cuda.so, not loaded."""
    return _build[0] / "libmillrace_cuda.so"


@pytest.fixture(scope="session")
def build_log(_build, nvcc) -> str:
    """What the build printed, with ptxas' report on every kernel."""
    return _build[1]
