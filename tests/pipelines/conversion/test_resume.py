"""An interrupted conversion goes on where it stopped and gives the bytes of an unbroken one; or says why it cannot."""

import errno
import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from fastdeit.pipelines.conversion import convert as converting
from fastdeit.pipelines.conversion import job
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.conversion.journal import Journal, JournalError, Kept
from fastdeit.pipelines.conversion.workers import ConvertError
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.beton_layout import MIN_PAGE
from fastdeit.pipelines.formats.beton_writer import BetonWriter
from pictures import encoded, picture
from refusals import not_converted
from system import refusing, run, run_python
from tiny_datasets import FORMATS, Items, assert_whole, files, image_folder

BAD = (3, 40, 41, 77)


def jpeg(seed):
    return encoded(picture(seed, (40, 30 + seed % 7)), "JPEG")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """120 JPEGs in four classes, four of them cut short."""
    images = [jpeg(i)[: 200 if i in BAD else None] for i in range(120)]
    return image_folder(tmp_path_factory.mktemp("tree"), images, 4)


@pytest.fixture(scope="module")
def data():
    return [jpeg(i) for i in range(30)]


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def unbroken(source, folder, **options):
    """The files of an unbroken conversion to `folder / "data"`, a new folder; source is a path, or images."""
    folder.mkdir()
    convert(source, folder / "data", **{"progress": False, **options})
    return files(folder)


def interrupted(data, at, dest, **options):
    """Leave behind what a conversion does that is interrupted at sample `at`."""
    items = [*data[:at], KeyboardInterrupt(), *data[at + 1 :]]
    with pytest.raises(KeyboardInterrupt):
        convert(Items(items), dest, progress=False, **options)


# Flushed after every image, so that there is always something to lose.
SCRIPT = """
import sys
from fastdeit.pipelines.conversion import job
from fastdeit.pipelines.conversion.convert import convert

if __name__ == "__main__":
    job.FLUSH_SECONDS = 0.0
    source, dest, format, workers = sys.argv[1:]
    convert(source, dest, format=format, workers=int(workers), shard_size=13, shuffle_seed=1, max_side=35,
            on_error="skip", resume=True, progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("format", "workers"), [("beton", 1), ("webdataset", 1), ("beton", 2)])
def test_killed_again_and_again(tree, out, tmp_path, format, workers):
    options = {"format": format, "shard_size": 13, "shuffle_seed": 1, "max_side": 35, "on_error": "skip"}
    whole = unbroken(tree, tmp_path / "whole", **options)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tree), str(out / "data"), format, str(workers)]
    rng, journal = random.Random(len(format) + workers), out / "data.journal"
    for _ in range(3):
        size = journal.stat().st_size if journal.exists() else 0
        process = subprocess.Popen(command)
        target = size + rng.randint(1, 2000)
        while process.poll() is None and (not journal.exists() or journal.stat().st_size < target):
            time.sleep(0.001)
        children = psutil.Process(process.pid).children(recursive=True) if workers > 1 else []
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0)
        assert not psutil.wait_procs(children, timeout=10)[1], "workers outlived the process that was killed"
        if process.returncode:
            # Nothing that a reader takes for a data set.
            assert {path.name for path in out.iterdir()} <= {"data.journal", "data.partial", "data.json.partial"}
    assert run(*command).returncode == 0
    assert files(out) == whole


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_whatever_a_crash_leaves_can_be_resumed(data, out, tmp_path, format, monkeypatch):
    """After a power cut any of the files may end early, or in garbage; what was kept may even be damaged."""
    monkeypatch.setattr(job, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the crash is made by hand
    monkeypatch.setattr(converting, "BetonWriter", functools.partial(BetonWriter, page_size=MIN_PAGE))
    options = {"format": format, "shard_size": 8, "on_error": "skip", "progress": False}
    data = [*data[:5], b"bad", b"bad", *data[7:20], b"bad", *data[21:]]
    whole = unbroken(Items(data), tmp_path / "whole", **options)
    rng = np.random.default_rng(0)
    resumed = []
    for _ in range(30):
        interrupted(data, int(rng.integers(1, len(data))), out / "data", format=format, shard_size=8, on_error="skip")
        left = [path for path in out.rglob("*") if path.is_file()]
        for path in rng.permutation(left)[: rng.integers(0, 3)]:
            stored = bytearray(path.read_bytes())
            at = int(rng.integers(len(stored)))
            match rng.integers(4):
                case 0:
                    del stored[at:]
                case 1:
                    stored[at:] = rng.bytes(len(stored) - at)
                case 2:
                    stored += rng.bytes(1000)
                case 3:
                    stored[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(stored)
        report = convert(Items(data), out / "data", resume=True, **options)
        assert files(out) == whole
        resumed.append(len(data) - report.done)
        empty(out)
    assert min(resumed) == 0
    assert max(resumed) > 20


@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupted_resumption_is_resumed(data, out, tmp_path, format):
    options = {"format": format, "shard_size": 7}
    whole = unbroken(Items(data), tmp_path / "whole", **options)
    for at in (4, 4, 11, 29):
        interrupted(data, at, out / "data", resume=True, **options)
    report = convert(Items(data), out / "data", resume=True, progress=False, **options)
    assert report.done == 1
    assert report.notes == ["it continued after 29 images of an interrupted conversion"]
    assert files(out) == whole


def test_another_conversion_is_not_resumed(data, tmp_path):
    dest = tmp_path / "data"
    interrupted(data, 9, dest, quality=90)
    left = files(tmp_path)
    named, classes = Items(data), Items(data, class_names=("a", "b", "d"))
    named.name = lambda index: f"thing {index}"
    for source, options, reason in (
        (Items(data), {"quality": 91}, "options.quality was 90 and is now 91"),
        (Items(data), {"shuffle_seed": 0}, "options.shuffle_seed was null and is now 0"),
        (Items(data), {"limit": 20}, "options.limit was null and is now 20"),
        (Items(data), {"format": "webdataset"}, 'options.format was "beton" and is now "webdataset"'),
        (Items(data, path="elsewhere"), {}, 'source.path was null and is now "elsewhere"'),
        (Items(data[:-1]), {}, "source.samples was 30 and is now 29"),
        (named, {}, "names was"),
        (classes, {}, "class_names was"),
    ):
        with pytest.raises(ConvertError, match=f"data: the interrupted conversion was different: {reason}"):
            convert(source, dest, **{"quality": 90, "resume": True, "progress": False, **options})
        assert files(tmp_path) == left
    # The same names, other images.
    with pytest.raises(ConvertError, match="item 8, sample 8: is not what the interrupted conversion stored"):
        convert(Items(data[::-1]), dest, quality=90, resume=True, progress=False)
    assert files(tmp_path) == left
    # Workers and what is done with bad images may change.
    report = convert(Items(data), dest, quality=90, resume=True, workers=2, on_error="skip", progress=False)
    assert report.done == 21


def test_a_bad_image_is_mended_or_left_out(data, tmp_path):
    items = [*data[:6], b"bad", *data[7:]]
    convert(Items(data), tmp_path / "mended", progress=False)
    convert(Items(items), tmp_path / "skipped", on_error="skip", progress=False)
    for dest, source, on_error in (("a", data, "fail"), ("b", items, "skip")):
        not_converted("item 6, sample 6", Items(items), tmp_path / dest)
        report = convert(Items(source), tmp_path / dest, on_error=on_error, resume=True, progress=False)
        assert report.done == 24
    for one, other in (("a", "mended"), ("b", "skipped")):
        for suffix in ("", ".json"):
            assert (tmp_path / (one + suffix)).read_bytes() == (tmp_path / (other + suffix)).read_bytes()
    # What was left out is not taken back by a stricter resumption.
    interrupted(items, 20, tmp_path / "c", on_error="skip")
    not_converted(r"item 6, sample 6: was left out before .* start again", Items(items), tmp_path / "c", resume=True)
    assert convert(Items(items), tmp_path / "c", on_error="skip", resume=True, progress=False).done == 10


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_resumed_is_replaced_and_said(data, tmp_path, format):
    dest = tmp_path / "data"
    report = convert(Items(data[:3]), dest, format=format, resume=True, progress=False)
    assert report.notes == ["there was nothing to resume, so it started at the first image"]
    interrupted(data, 9, dest, format=format)
    report = convert(Items(data[:5]), dest, format=format, progress=False)
    assert report.notes == ["an interrupted conversion had done 9 images, which --resume would have kept"]
    assert_whole(dest, 5)
    assert not {"data.journal", "data.partial"} & {path.name for path in tmp_path.iterdir()}


def test_what_another_format_left_is_not_touched(data, tmp_path):
    for format, other in ((FORMATS[0], FORMATS[1]), (FORMATS[1], FORMATS[0])):
        interrupted(data, 9, tmp_path / format, format=format)
        left = files(tmp_path)
        not_converted(rf"{format}\.partial: is ", Items(data), tmp_path / format, format=other, error=UserError)
        assert files(tmp_path) == left
        assert convert(Items(data), tmp_path / format, format=format, resume=True, progress=False).done == 21


def test_two_conversions_to_one_place(data, tmp_path):
    interrupted(data, 9, tmp_path / "data")
    left = files(tmp_path)
    with Journal(tmp_path / "data.journal") as journal:
        for resume in (True, False):
            with pytest.raises(JournalError, match=r"data\.journal: another conversion to the same place is under way"):
                convert(Items(data), tmp_path / "data", resume=resume, progress=False)
        assert sum(isinstance(entry, Kept) for entry in journal.entries()) == 9
    assert files(tmp_path) == left
    assert convert(Items(data), tmp_path / "data", resume=True, progress=False).done == 21


def test_a_file_system_without_locks(data, tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", refusing(errno.ENOLCK))
    report = convert(Items(data), tmp_path / "data", progress=False)
    assert "this file system has no locks" in report.notes[0]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "step"), [(errno.ENOSPC, 1), (errno.EDQUOT, 9), (errno.EFBIG, 11)])
@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_at_every_sync(data, out, tmp_path, monkeypatch, format, number, step):
    """What cannot be written is noticed at the latest by fsync, which is called wherever something must be on disk."""
    monkeypatch.setattr(job, "FLUSH_SECONDS", 0.0)
    sync = os.fsync
    remaining = itertools.count()

    def full(descriptor):
        if next(remaining) == fails_at:
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    items = [*data[:2], b"bad", *data[3:6]]
    options = {"format": format, "shard_size": 3, "on_error": "skip", "progress": False}
    fails_at = -1
    whole = unbroken(Items(items), tmp_path / "whole", **options)
    calls = next(remaining)
    assert calls > 15
    done = []
    for fails_at in range(0, calls, step):
        remaining = itertools.count()
        with pytest.raises(ConvertError, match=re.escape(os.strerror(number))) as caught:
            convert(Items(items), out / "data", **options)
        if fails_at == calls - 1:  # of the folder, after all has its name
            assert "data: is complete, but may not survive a power cut" in str(caught.value)
            assert files(out) == whole
            break
        assert "cannot be written" in str(caught.value)
        kept = re.search(r"(\d+) of 6 images are kept in .*data\.partial: make room", str(caught.value))
        assert kept or "has been removed" in str(caught.value)
        done.append(int(kept[1]) if kept else 0)
        if not kept:
            assert not list(out.iterdir())
        remaining = itertools.count(calls)
        report = convert(Items(items), out / "data", resume=True, **options)
        assert 6 - report.done == done[-1]
        assert files(out) == whole
        empty(out)
    # Nothing is lost that an earlier sync had on disk.
    assert done == sorted(done)
    assert done[-1] > 1


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("before", [True, False])
def test_an_interrupt_at_any_sync_loses_no_image(data, out, tmp_path, monkeypatch, format, before):
    """Ctrl-C just before or just after a sync; each image that was encoded is kept, once."""
    options = {"format": format, "shard_size": 3, "progress": False}
    whole = unbroken(Items(data[:6]), tmp_path / "whole", **options)
    monkeypatch.setattr(job, "FLUSH_SECONDS", 0.0)
    sync = os.fsync

    def interrupted(descriptor):
        hit = next(remaining) == interrupted_at
        if hit and before:
            raise KeyboardInterrupt
        sync(descriptor)
        if hit:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    kept = []
    for interrupted_at in range(1, 10):  # noqa: B007 -- a closure reads it
        remaining = itertools.count()
        with pytest.raises(KeyboardInterrupt):
            convert(Items(data[:6]), out / "data", **options)
        remaining = itertools.count(100)
        kept.append(6 - convert(Items(data[:6]), out / "data", resume=True, **options).done)
        assert files(out) == whole
        empty(out)
    assert kept == sorted(kept)
    assert kept[1] >= 1


FILL = """
import re, resource, sys
from fastdeit.pipelines.conversion import job
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.conversion.workers import ConvertError

source, dest, format = sys.argv[1:]
job.FLUSH_SECONDS = 0.0
base = 8 << 20 if format == "beton" else 0  # where the first image of a beton file lies
for limit in range(base + 10_000, base + 200_000, 19_997):
    for _ in range(2):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            convert(source, dest, format=format, on_error="skip", mode="raw", resume=True, progress=False)
            error = ""
        except ConvertError as caught:
            error = str(caught)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        found = re.search(r"File too large.* (\\d+) of 120 images are kept", error)
        print(found[1] if found else error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_resuming_on_a_full_disk_loses_nothing(tree, out, tmp_path, format):
    """Judged by the kernel, which lets no file grow; each limit is met twice, and the next one is a little higher."""
    options = {"format": format, "on_error": "skip", "mode": "raw", "progress": False}
    whole = unbroken(tree, tmp_path / "whole", **options)
    done = run_python("-c", FILL, tree, out / "data", format, check=True)
    kept = [int(line) for line in done.stdout.split()]
    assert kept == sorted(kept)
    assert kept[::2] == kept[1::2]
    assert kept[0] >= 1
    assert kept[-1] > 25
    partial = out / "data.partial"
    stored = [partial] if partial.is_file() else list(partial.iterdir())
    assert sum(path.stat().st_blocks for path in stored) * 512 < 400_000
    report = convert(tree, out / "data", resume=True, **options)
    assert 120 - report.done == kept[-1]
    assert files(out) == whole


def test_a_folder_that_cannot_be_written(data, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "FLUSH_SECONDS", 0.0)
    interrupted(data, 9, tmp_path / "data")
    monkeypatch.setattr(os, "fsync", refusing(errno.EIO))
    not_converted(r"data: cannot be written \(Input/output error\)", Items(data), tmp_path / "data", resume=True)
    monkeypatch.undo()
    assert convert(Items(data), tmp_path / "data", resume=True, progress=False).done == 21


def test_the_sidecar_names_what_decides_the_bytes(data, tmp_path):
    convert(Items(data), tmp_path / "data", progress=False)
    options = json.loads((tmp_path / "data.json").read_text())["options"]
    assert {"mode", "quality", "max_side", "shuffle_seed", "limit", "pillow", "jpeg"} <= options.keys()
