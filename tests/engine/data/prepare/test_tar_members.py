import io
import tarfile

import pytest

from millrace.engine.data.prepare.tar_members import Damage, Member, members, read_member
from millrace.engine.data.reject_reasons import Reason


def write(path, names, dialect=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=dialect) as tar:
        for i, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 100 * i
            tar.addfile(member, io.BytesIO(bytes([i]) * member.size))
    return path


def read(path):
    with path.open("rb") as file:
        return [
            (item.name, read_member(file, item)) if isinstance(item, Member) else item
            for item in members(file)
        ]


@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path, dialect):
    names = ["a.jpg", "b/c.txt", "empty"]
    if dialect != tarfile.USTAR_FORMAT:
        names += ["long/" * 60 + "x.jpg", "naïve 猫.jpg", "l" * 500]
    names.append("d/" * 40 + "y.jpg" if dialect == tarfile.USTAR_FORMAT else "last")
    path = write(tmp_path / "a.tar", names, dialect)
    assert read(path) == [(name, bytes([i]) * 100 * i) for i, name in enumerate(names)]


def test_names_that_are_not_utf8(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("café"))
        tar.addfile(tarfile.TarInfo("é" * 200))
    expected = [
        b"caf\xe9".decode("utf-8", "surrogateescape"),
        (b"\xe9" * 200).decode("utf-8", "surrogateescape"),
    ]
    assert [name for name, _ in read(tmp_path / "a.tar")] == expected


def test_kinds(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"of kind {kind.decode()}")
            member.type = kind
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("last"))
    with (tmp_path / "a.tar").open("rb") as file:
        kinds = [(item.name[-1], item.regular) for item in members(file)]
    assert kinds == [("0", True), ("2", False), ("1", False), ("6", False), ("t", True)]


def test_what_follows_the_end_of_another_tar_is_read(tmp_path):
    """`cat a.tar b.tar`: tarfile would stop at the first end and say nothing."""
    one, two = write(tmp_path / "a.tar", ["a", "b"]), write(tmp_path / "b.tar", ["c", "d"])
    both = tmp_path / "both.tar"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    assert [name for name, _ in read(both)] == ["a", "b", "c", "d"]


def test_damaged_headers_are_passed_over_and_told(tmp_path):
    """tarfile takes the first of them for the end of the archive."""
    path = write(tmp_path / "a.tar", ["a", "b", "c", "d"])
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        offsets = [member.offset for member in tar.getmembers()]
    data[offsets[1] + 150] ^= 1
    path.write_bytes(data)
    first, damage, third, fourth = read(path)
    assert (first[0], third[0], fourth[0]) == ("a", "c", "d")
    assert damage.reason is Reason.CORRUPT_TAR
    assert f"from byte {offsets[1]} to {offsets[2]} of {len(data)}" in damage.detail
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 1


@pytest.mark.parametrize(
    ("cut", "names", "part"),
    [
        (0, [], "ends at byte 0"),
        (300, [], "ends at byte 300"),
        (512 * 2 + 700, ["a"], "ends within 'b', 324 bytes are missing"),
        (512 * 3, ["a", "b"], "without the two empty blocks"),
        (512 * 3 + 100, ["a", "b"], "without the two empty blocks"),
    ],
)
def test_every_cut_is_told(tmp_path, cut, names, part):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, size in (("a", 0), ("b", 1000), ("c", 0)):
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(bytes(size)))
    data = path.read_bytes()
    cut = {512 * 3: 512 * 4, 512 * 3 + 100: 512 * 4 + 100, 512 * 2 + 700: 512 * 2 + 676}.get(cut, cut)
    path.write_bytes(data[:cut])
    *found, damage = read(path)
    assert [name for name, _ in found] == names
    assert isinstance(damage, Damage)
    assert damage.reason is Reason.TRUNCATED_TAR
    assert part in damage.detail


def test_sizes_and_names_that_are_too_large_do_not_fill_memory(tmp_path):
    for kind, size, reason in (
        (tarfile.GNUTYPE_LONGNAME, 2**30, Reason.CORRUPT_TAR),
        (tarfile.XHDTYPE, 2**34, Reason.CORRUPT_TAR),
        (tarfile.REGTYPE, 2**60, Reason.TRUNCATED_TAR),
        (tarfile.REGTYPE, -5, Reason.CORRUPT_TAR),
    ):
        member = tarfile.TarInfo("x")
        member.type, member.size = kind, size
        path = tmp_path / "a.tar"
        path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
        (damage,) = [item for item in read(path) if isinstance(item, Damage)]
        assert damage.reason is reason


def test_size_from_a_pax_header(tmp_path):
    """Files above 8 GiB have their size there; the header's own is not used then."""
    record = b"12 size=600\n"
    extra = tarfile.TarInfo("extra")
    extra.type, extra.size = tarfile.XHDTYPE, len(record)
    member = tarfile.TarInfo("a")
    member.size = 5
    blocks = extra.tobuf() + record.ljust(512, b"\0") + member.tobuf() + b"x" * 600 + bytes(424 + 1024)
    (tmp_path / "a.tar").write_bytes(blocks)
    assert read(tmp_path / "a.tar") == [("a", b"x" * 600)]
