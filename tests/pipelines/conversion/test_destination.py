"""What a conversion replaces, and what it never touches; judged by the bytes on disk and the kernel's file types."""

import io
import os
import shutil
import stat
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from archives import jpeg, pack
from fastdeit.pipelines import console
from fastdeit.pipelines.conversion import job
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.errors import UserError
from refusals import not_converted
from system import bind_socket, run, run_python
from tiny_datasets import FORMATS, assert_whole, image_folder

REFUSED = "move it away|name another|remove it|name a file"
ERRORS = (ValueError, UserError, OSError)


def shard(path, first, count=3):
    files = {}
    for i in range(first, first + count):
        files |= {f"{i}.jpg": jpeg(i), f"{i}.cls": b"1"}
    return pack(path, files)


@pytest.fixture
def tree(tmp_path):
    """Two classes of two images; beside it nothing."""
    return image_folder(tmp_path / "tree", map(jpeg, range(4)), 2)


def state(folder):
    """Type, links and content of everything below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = os.lstat(path)
        regular = stat.S_ISREG(status.st_mode)
        content = path.read_bytes() if regular else os.readlink(path) if path.is_symlink() else None
        found[str(path.relative_to(folder))] = stat.S_IFMT(status.st_mode), status.st_ino, content
    return found


def refused(source, dest, match=REFUSED, **options):
    """Assert that a conversion is refused, in every way to ask for it, and changes nothing."""
    before = state(dest.parent)
    for resume in (False, True):
        not_converted(match, source, dest, resume=resume, **options, error=ERRORS)
        assert state(dest.parent) == before


@pytest.mark.slow
def test_a_glob_of_two_archives_overwrites_none(tmp_path):
    """As the shell hands it on: the second one is DEST."""
    shards = [shard(tmp_path / f"train-{i}.tar", 3 * i) for i in range(2)]
    before = state(tmp_path)
    done = run_python("-m", "fastdeit.commands.convert", *shards)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "train-1.tar: is an archive, which is never replaced. Put a pattern such as" in done.stderr
    assert state(tmp_path) == before


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "kind", ["file", "empty", "link", "broken", "fifo", "socket", "device", "beton link", "folder"]
)
def test_what_is_no_data_set_is_not_replaced(tree, out, monkeypatch, kind, format):
    dest, other = out / "data", out / "other"
    other.write_text("somebody's")
    match kind:
        case "file":
            dest.write_text("a thesis")
        case "empty":
            dest.touch()
        case "link":
            dest.symlink_to(other)
        case "broken":
            dest.symlink_to("nowhere")
        case "fifo":
            os.mkfifo(dest)
        case "socket":
            bind_socket(dest)
        case "device":
            try:
                os.mknod(dest, stat.S_IFCHR | 0o666, os.makedev(1, 3))
            except PermissionError:  # to root alone it is given
                dest.symlink_to(os.devnull)
        case "beton link":
            convert(tree, out / "real", format=format, progress=False)
            dest.symlink_to("real")
        case "folder":
            dest.mkdir()
            (dest / "dataset.json").write_text("{}")
    refused(tree, dest, format=format)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize(
    "suffix", [".json", ".partial", ".json.partial", ".journal", ".rejects.jsonl", ".rejects.jsonl.partial"]
)
def test_files_of_others_beside_it_are_not_touched(tree, out, suffix, linked, format):
    if format == "webdataset" and suffix == ".json":
        return  # shards have theirs in the folder
    other = out / f"data{suffix}"
    if linked:
        (out / "mine").write_text("a thesis")
        other.symlink_to("mine")
    else:
        other.write_text('{"format": "fastdeit-beton", "seal": "mine"}')
    (tree / "class0" / "9.jpg").write_bytes(b"bad")
    refused(tree, out / "data", rf"data{suffix}: is .*(move it away|remove it)", format=format, on_error="skip")


@pytest.mark.parametrize("format", FORMATS)
def test_a_data_set_of_ours_is_replaced(tree, tmp_path, format):
    dest = tmp_path / "data"
    convert(tree, dest, format=format, progress=False, limit=3)
    (tree / "class0" / "9.jpg").write_bytes(b"bad")
    convert(tree, dest, format=format, progress=False, on_error="skip")
    convert(tree, dest, format=format, progress=False, on_error="skip")
    assert_whole(dest, 4)
    assert len((tmp_path / "data.rejects.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("damage", ["no sidecar", "another's sidecar", "cut short", "a copy among shards"])
def test_a_data_set_without_its_own_sidecar_is_not_replaced(tree, out, damage):
    """As FFCV's own files are: it took hours to write, and nothing says that fastdeit-convert did."""
    convert(tree, out / "data", progress=False, limit=3)
    convert(tree, out / "shards", format="webdataset", progress=False, limit=3)
    match damage:
        case "no sidecar":
            (out / "data.json").unlink()
            (out / "shards" / "dataset.json").unlink()
        case "another's sidecar":
            convert(tree, out / "two", progress=False, limit=2)
            os.replace(out / "two.json", out / "data.json")
            shutil.copy(out / "data.json", out / "shards" / "dataset.json")
        case "cut short":
            os.truncate(out / "data", (out / "data").stat().st_size - 1)
            os.truncate(out / "shards" / "shard-000000.tar", 512)
        case "a copy among shards":
            (out / "shards" / "shard-000000 (1).tar").write_bytes(b"x")
    if damage != "a copy among shards":
        refused(tree, out / "data")
    refused(tree, out / "shards", format="webdataset")


@pytest.mark.parametrize("link", [None, "symbolic", "hard"])
@pytest.mark.parametrize("form", ["{}", "webdataset:{}/shard-*.tar", "webdataset:{}/shard-{{000000..000001}}.tar"])
def test_shards_are_not_converted_onto_themselves(tree, out, form, link):
    shards, dest = out / "shards", out / "shards"
    convert(tree, shards, format="webdataset", shard_size=2, progress=False)
    if link == "symbolic":
        dest = out / "link"
        dest.symlink_to("shards")
    elif link == "hard":
        dest = shutil.copytree(shards, out / "twin", copy_function=os.link)
    refused(form.format(shards), dest, "the source .*: name", format="webdataset")


def test_an_archive_is_not_converted_onto_itself(out):
    path = shard(out / "a.tar", 0)
    os.link(path, out / "b.beton")
    (out / "c.beton").symlink_to("a.tar")
    # Nor onto what lies beside DEST.
    os.link(path, out / "d.beton.journal")
    os.link(path, out / "e.beton.partial")
    for name in ("a.tar", "b.beton", "c.beton", "../out/a.tar", "d.beton", "e.beton"):
        refused(path, out / name, "is, or contains, the source")


def test_a_place_that_a_link_puts_into_the_source(tree, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.jpg").write_bytes(jpeg(9))
    (tree / "class0" / "more").symlink_to(elsewhere)
    (tmp_path / "alias").symlink_to(tree)
    for dest in (elsewhere / "data", tmp_path / "alias" / "data", tree / "class0" / "more" / "data"):
        refused(tree, dest, "lies within the source .*: name a place outside")


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_appears_meanwhile_stays(tree, tmp_path, monkeypatch, format):
    """Conversions take hours; the place was free when it began."""
    dest = tmp_path / "data"
    write = job._write_rejects

    def meanwhile(*arguments):
        dest.write_text("a thesis")
        write(*arguments)

    monkeypatch.setattr(job, "_write_rejects", meanwhile)
    not_converted("data: is ", tree, dest, format=format, error=ERRORS)
    monkeypatch.undo()
    assert dest.read_text() == "a thesis"
    dest.unlink()
    report = convert(tree, dest, format=format, resume=True, progress=False)
    assert (report.num_samples, report.done) == (4, 0)


@pytest.mark.parametrize("resume", [False, True])
def test_a_conversion_that_died_while_it_replaced_a_data_set_can_begin_anew(tree, tmp_path, monkeypatch, resume):
    """The sidecar has its name, the data not yet; and the next run dies, too."""
    dest = tmp_path / "data.beton"
    convert(tree, dest, limit=2, progress=False)
    replace, calls = os.replace, iter(range(100))

    def die(*arguments):
        if next(calls) == 1:
            raise KeyboardInterrupt
        replace(*arguments)

    interrupt = Mock(side_effect=KeyboardInterrupt)
    for module, name, dies in ((os, "replace", die), (job.Conversion, "_store_all", interrupt)):
        monkeypatch.setattr(module, name, dies)
        with pytest.raises(KeyboardInterrupt):
            convert(tree, dest, resume=resume and dies is interrupt, progress=False)
        monkeypatch.undo()
    convert(tree, dest, resume=resume, progress=False)
    assert_whole(dest, 4)


def test_a_folder_of_somebodys_at_the_old_ones_name_stays(tree, tmp_path):
    """`.replaced` is where the old data set waits while it is replaced; nothing was replaced here."""
    convert(tree, tmp_path / "data.replaced", format="webdataset", progress=False)
    before = state(tmp_path / "data.replaced")
    convert(tree, tmp_path / "data", format="webdataset", progress=False)
    assert state(tmp_path / "data.replaced") == before
    assert_whole(tmp_path / "data", 4)


@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_crash_between_two_names_is_resumed(tree, out, tmp_path, monkeypatch, format, replacing):
    dest = out / "data"
    if replacing:
        convert(tree, dest, format=format, limit=2, progress=False)
    convert(tree, tmp_path / "whole", format=format, progress=False)
    for name in ("replace", "rename"):
        original = getattr(os, name)
        for dies_at in range(3):
            calls = iter(range(100))

            def die(*arguments, original=original, dies_at=dies_at, calls=calls):
                if next(calls) == dies_at:
                    raise KeyboardInterrupt
                original(*arguments)

            with monkeypatch.context() as patch:
                patch.setattr(os, name, die)
                patch.setattr(job, "FLUSH_SECONDS", 0.0)
                try:
                    convert(tree, dest, format=format, shuffle_seed=3, progress=False)
                except KeyboardInterrupt:
                    convert(tree, dest, format=format, shuffle_seed=3, resume=True, progress=False)
            assert_whole(dest, 4)
            if not replacing:
                run("rm", "-r", *out.iterdir(), check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirect", "reason"), [(">/dev/full", "No space left on device"), ("| true", "Broken pipe"), (">&-", "")]
)
def test_a_report_that_nobody_can_read(tree, tmp_path, redirect, reason):
    dest = tmp_path / "data"
    command = f"{sys.executable} -m fastdeit.commands.convert {tree} {dest} {redirect}; exit ${{PIPESTATUS[0]}}"
    done = run("bash", "-c", command, status=0)
    assert "Traceback" not in done.stderr
    if reason:
        assert done.stderr == f"note: standard output cannot be written ({reason}): {dest} is complete\n"
    command = f"{sys.executable} -m fastdeit.commands.convert --verify {dest} {redirect} 2>&-; exit ${{PIPESTATUS[0]}}"
    assert run("bash", "-c", command).returncode == 0
    assert_whole(dest, 4)


def test_a_terminal_that_goes_away(tree, tmp_path, monkeypatch):
    class Gone(io.StringIO):
        def isatty(self):
            return True

        def write(self, _):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Gone())
    report = convert(tree, tmp_path / "data", progress=True)
    assert report.num_samples == 4
    assert report.notes == ["the progress can no longer be shown (Broken pipe)"]


def test_names_that_the_terminal_cannot_show(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert console.say("Ångström \udcff") is None
    assert stream.buffer.getvalue() == b"\\xc5ngstr\\xf6m \\udcff\n"


def test_a_place_without_a_name(tree):
    not_converted(r"has no name of its own: name a file or folder in it", tree, Path("/"))
