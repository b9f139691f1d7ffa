"""The index of a tar archive, judged by tarfile; and what it must refuse, made by tarfile and by hand."""

import gzip
import io
import os
import pickle
import tarfile
from functools import partial

import numpy as np
import pytest

import refusals
from fastdeit.pipelines.sources import SampleError, SourceError, tar

refused = partial(refusals.refused, error=SourceError)


def member(name, data=b"", kind=tarfile.REGTYPE, **fields):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def write(path, *members, format=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=format) as file:
        for info, data in members:
            file.addfile(info, io.BytesIO(data))
    return path


def index(path):
    archive = tar.Archive(path)
    return archive, tar.index(archive, str(path))


CONTENT = [
    member("a.jpg", b"one"),
    member("folder/", kind=tarfile.DIRTYPE),
    member("folder/b.jpg", b"x" * 512),
    member("./c.jpg", b"y" * 513),
    member("empty.jpg"),
    member("folder/" + "long" * 40 + "/" + "name" * 50 + ".jpg", b"long"),
    member("Ångström/本.jpg", b"unicode"),
    member("d" * 90 + "/" + "e" * 90 + ".jpg", b"prefix"),
]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_members_are_tarfiles(tmp_path, format):
    content = CONTENT[:5] + CONTENT[6:] if format == tarfile.USTAR_FORMAT else CONTENT
    path = write(tmp_path / "a.tar", *content, format=format)
    archive, members = index(path)
    with tarfile.open(path) as judge:
        files = [info for info in judge if info.isfile()]
        assert members.names == [info.name.removeprefix("./") for info in files]
        for i, info in enumerate(files):
            file = judge.extractfile(info)
            assert file is not None
            assert archive.member(info.name, int(members.offset[i]), int(members.size[i])) == file.read()
    assert members.ignored == 0


def test_sizes_in_base_256_and_in_pax(tmp_path):
    """Both forms that sizes of 8 GiB and more have, here of small ones."""
    plain = write(tmp_path / "b.tar", member("a.jpg", b"one"), format=tarfile.USTAR_FORMAT)
    patch(plain, 124, b"\x80" + (3).to_bytes(11, "big"))
    write(tmp_path / "c.tar", member("a.jpg", b"one", pax_headers={"size": "3"}), format=tarfile.PAX_FORMAT)
    for name in "bc":
        archive, members = index(tmp_path / f"{name}.tar")
        assert members.names == ["a.jpg"]
        assert archive.read(int(members.offset[0]), int(members.size[0])) == b"one"


def test_hidden_files_are_counted(tmp_path):
    content = [member(name, b"x") for name in ("a.jpg", "._a.jpg", "f/.DS_Store", "__MACOSX/a.jpg", ".git/x", "b.jpg")]
    _, members = index(write(tmp_path / "a.tar", *content))
    assert (members.names, members.ignored) == (["a.jpg", "b.jpg"], 4)


def test_names_do_not_reach_the_terminal_raw(tmp_path):
    names = ["a\x1b[2J.jpg", "b\n.jpg"]
    _, members = index(write(tmp_path / "a.tar", *(member(name, b"x") for name in names)))
    assert members.names == [r"a\x1b[2J.jpg", r"b\n.jpg"]


REFUSED = {
    "absolute": ([member("/etc/a.jpg", b"x")], "/etc/a.jpg: an absolute name"),
    "parent": ([member("a/../../b.jpg", b"x")], "'..'"),
    "parent folder": ([member("..", kind=tarfile.DIRTYPE)], "'..'"),
    "hard link": ([member("a.jpg", b"x"), member("b.jpg", kind=tarfile.LNKTYPE, linkname="a.jpg")], "a hard link"),
    "symbolic link": ([member("b.jpg", kind=tarfile.SYMTYPE, linkname="/etc/passwd")], "b.jpg: is a symbolic link"),
    "device": ([member("zero", kind=tarfile.CHRTYPE, devmajor=1, devminor=5)], "zero: is a device"),
    "block device": ([member("sda", kind=tarfile.BLKTYPE)], "a device"),
    "fifo": ([member("pipe", kind=tarfile.FIFOTYPE)], "a fifo"),
    "sparse": ([member("hole.jpg", kind=tarfile.GNUTYPE_SPARSE)], "sparse"),
    "unknown": ([member("x", kind=b"V")], "of type 'V'"),
    "twice": ([member("a.jpg", b"1"), member("./a.jpg", b"2")], "a.jpg: a second member of this name"),
    "twice hidden": ([member(".a", b"1"), member(".a", b"2")], "a second member"),
    "no name": ([member("", b"x")], "without a name"),
}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("kind", REFUSED)
def test_hostile_members_are_refused_by_name(tmp_path, kind, format):
    content, reason = REFUSED[kind]
    path = write(tmp_path / "a.tar", member("first.jpg", b"fine"), *content, format=format)
    message = refused(reason, index, path)
    assert str(path) in message


def test_sparse_in_pax_is_refused(tmp_path):
    info, data = member("a.jpg", b"x", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
    refused("a sparse member", index, write(tmp_path / "a.tar", (info, data), format=tarfile.PAX_FORMAT))


def checksummed(archive):
    """`archive` with the right checksum in its first header."""
    archive = bytearray(archive)
    archive[148:156] = b" " * 8
    archive[148:156] = b"%06o\0 " % sum(archive[:512])
    return bytes(archive)


def patch(path, at, value):
    """Overwrite bytes of the first header, and fit its checksum."""
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(checksummed(content))
    return path


@pytest.mark.parametrize(
    "size", [b"77777777777\0", b"\x80" + b"\xff" * 11, b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7, b"00000002001\0"]
)
def test_declared_sizes_beyond_the_end(tmp_path, size):
    path = write(tmp_path / "a.tar", member("huge.jpg", b"x"))
    os.truncate(path, 1536)
    refused(r"a.tar:huge.jpg: declares \d+ bytes, beyond the end", index, patch(path, 124, size))


@pytest.mark.parametrize("size", [b"\xff" * 12, b"-0000000001\0", b"0000000000x\0", b"99999999999\0"])
def test_numbers_that_are_none(tmp_path, size):
    path = patch(write(tmp_path / "a.tar", member("a.jpg", b"x")), 124, size)
    refused("not a number", index, path)


@pytest.mark.parametrize(
    "record", [b"", b"99 path=a\n", b"5 path=a\n", b"x path=a\n", b"8 path a\n", b"12 size=-1xx\n"]
)
def test_damaged_pax_headers(tmp_path, record):
    path = write(tmp_path / "a.tar", member("long" * 60, b"x"), format=tarfile.PAX_FORMAT)
    content = bytearray(path.read_bytes())
    assert content[156:157] == b"x"
    content[512:1024] = (record or b" " * 512).ljust(512, b" ")
    path.write_bytes(content)
    refused("a damaged pax header", index, path)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_file_that_became_an_extended_header_is_not_left_out(tmp_path, kind):
    """One changed byte, and its checksum: GNU tar stops at most of them."""
    image = b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(range(256))
    path = patch(write(tmp_path / "a.tar", member("a.jpg", image), member("b.jpg", image)), 156, kind)
    refused(r"a\.tar, byte 0: a damaged (pax header|long name)", index, path)


def test_truncation_anywhere_is_found(tmp_path):
    """Also where only the end-of-archive blocks are missing, which tarfile puts up with."""
    content = write(tmp_path / "a.tar", *CONTENT).read_bytes()
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512
    for length in range(0, end + 1024, 256):
        (tmp_path / "cut.tar").write_bytes(content[:length])
        refused("cut", index, tmp_path / "cut.tar")
    (tmp_path / "cut.tar").write_bytes(content[: end + 1024])
    index(tmp_path / "cut.tar")


def test_more_after_the_end(tmp_path):
    one = write(tmp_path / "a.tar", member("a.jpg", b"x")).read_bytes()
    (tmp_path / "two.tar").write_bytes(one + one)
    refused("holds more after its end", index, tmp_path / "two.tar")
    os.truncate(tmp_path / "a.tar", len(one) + (1 << 34))
    refused("after its end", index, tmp_path / "a.tar")


def test_no_tar_at_all(tmp_path):
    for content in (b"", b"text" * 1000, np.random.default_rng(0).bytes(4096)):
        (tmp_path / "a.tar").write_bytes(content)
        refused("Fetch the archive again", index, tmp_path / "a.tar")


def test_gzipped_archives_lie_in_memory_up_to_a_bound(tmp_path):
    plain = write(tmp_path / "a.tar", *CONTENT).read_bytes()
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(plain))
    archive, members = index(path)
    _, judge = index(tmp_path / "a.tar")
    assert members.names == judge.names
    assert archive.read(int(members.offset[0]), 3) == b"one"
    refused("not copied", pickle.dumps, archive, error=TypeError)
    assert tar.Archive(path, len(plain)).size == len(plain)
    refused(f"holds more than {len(plain) - 1} bytes.*gunzip it first", tar.Archive, path, len(plain) - 1)
    for cut in (gzip.compress(plain)[:-9], gzip.compress(plain)[:40], gzip.compress(plain)[:-8] + b"12345678"):
        path.write_bytes(cut)
        refused(r"a.tar.gz: truncated or damaged", tar.Archive, path)


def test_an_archive_that_changes_is_noticed(tmp_path):
    path = write(tmp_path / "a.tar", member("a.jpg", b"one"))
    archive, members = index(path)
    copy = pickle.loads(pickle.dumps(archive))
    assert copy.read(int(members.offset[0]), 3) == b"one"
    os.truncate(path, 600)
    refused("has changed since", copy.member, "a.jpg", int(members.offset[0]), 3)


def test_members_too_large_for_a_sample(tmp_path):
    with open(tmp_path / "a.tar", "wb") as file:
        info = tarfile.TarInfo("huge.jpg")
        info.size = tar.MAX_FILE + 512
        file.write(info.tobuf())
        file.truncate(512 + info.size + 1024)
    archive, members = index(tmp_path / "a.tar")
    refused("at most", archive.member, "huge.jpg", int(members.offset[0]), int(members.size[0]), error=SampleError)
