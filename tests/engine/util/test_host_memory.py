"""The machine's free memory, or what control groups leave of it."""

import pytest

from millrace.engine.util import host_memory
from millrace.engine.util.host_memory import available_memory

GB = 10**9


@pytest.fixture
def limit(tmp_path, monkeypatch):
    """Of memory for a control group "job/step", in which this process seems to be, or one above it."""
    monkeypatch.setattr(host_memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(host_memory, "_own_group", lambda: "job/step")
    monkeypatch.setattr(host_memory, "_available_on_machine", lambda: 64 * GB)

    def write(group, maximum, used, pages):
        folder = tmp_path / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{maximum}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\nactive_file {pages}\ninactive_file 0\n")

    return write


def test_this_machine():
    assert 10**6 < available_memory() < 10**15


def test_without_a_limit_it_is_the_machines(limit):
    limit("job/step", "max", 9 * GB, 0)
    assert available_memory() == 64 * GB


def test_a_limit_leaves_what_is_not_used_and_pages_of_files(limit):
    limit("job/step", 32 * GB, 20 * GB, 5 * GB)
    assert available_memory() == 17 * GB


def test_a_limit_of_a_group_above(limit):
    limit("job/step", "max", 1 * GB, 0)
    limit("job", 16 * GB, 15 * GB, 0)
    assert available_memory() == 1 * GB
