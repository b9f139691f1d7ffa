"""A machine's own copy of a data set: made once, whole and checked, or not at all."""

import os
import shutil
import socket
import threading
from collections import namedtuple

import pytest

from fastdeit.pipelines.formats import local_copy as module
from fastdeit.pipelines.formats.beton_layout import sidecar_path
from fastdeit.pipelines.formats.dataset import open_dataset
from fastdeit.pipelines.formats.local_copy import local_copy
from fastdeit.pipelines.formats.sidecar import _seal
from fastdeit.pipelines.formats.sidecar import write as write_sidecar
from fastdeit.pipelines.machine import MachineError
from pictures import picture
from refusals import refused
from tiny_datasets import stored, write


def make(path, seed=0):
    path.parent.mkdir(exist_ok=True)
    return write(path, [stored(picture(seed + i, (30, 20))) for i in range(5)])


@pytest.fixture(params=["train.beton", "train", "train [1].beton"])
def original(request, tmp_path):
    """A data set of a few images."""
    return make(tmp_path / "source" / request.param)


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fill(cache, dataset):
    said = []
    return local_copy(dataset, cache, said.append), said


def test_a_copy_is_made_once(original, tmp_path):
    cache = tmp_path / "cache"
    copy, said = fill(cache, original)
    assert said == [f"copying {original.path} (0.0 GB) to {copy.path.parent}"]
    assert copy.path.parent.parent == cache
    assert [bytes(copy.read(i)) for i in range(len(copy))] == [bytes(original.read(i)) for i in range(len(original))]
    assert copy.check() == []
    source = original.path if original.path.is_dir() else original.path.parent
    assert tree(copy.path.parent if copy.path.is_file() else copy.path).items() <= tree(source).items()
    before = tree(cache)
    again, said = fill(cache, original)
    assert (again.path, said) == (copy.path, [])
    assert tree(cache) == before
    assert sorted(path.name for path in cache.iterdir()) == [f"{copy.path.parent.name}{end}" for end in ("", ".lock")]


def test_processes_wait_for_the_first(original, tmp_path, monkeypatch):
    begun, go, said = threading.Event(), threading.Event(), []
    copy = module._copy

    def slow(*arguments):
        begun.set()
        assert go.wait(60)
        copy(*arguments)

    monkeypatch.setattr(module, "_copy", slow)
    threads = [threading.Thread(target=local_copy, args=(original, tmp_path / "cache", said.append)) for _ in range(2)]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    while len(said) < 2:
        assert threads[1].is_alive()
    go.set()
    for thread in threads:
        thread.join()
    assert [text.split()[0] for text in said] == ["copying", "waiting"]


def test_a_damaged_image_is_named_and_leaves_no_copy(tmp_path):
    original = make(tmp_path / "train.beton")
    with open(original.path, "r+b") as file:
        file.seek(int(original.offset[1]) + 5)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    refused("the checksum of image 1 is wrong after copying", fill, tmp_path / "cache", open_dataset(original.path))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_disk_that_is_too_small_is_refused_at_once(original, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(MachineError, match=r"has only 0\.0 GB free: .* another --data\.cache_dir"):
        fill(tmp_path / "cache", original)


def test_a_full_disk_is_the_machines_fault(original, tmp_path, monkeypatch):
    def full(source, target, bar):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(module, "_copy", full)
    refused(r"cannot be copied to .*: No space left", fill, tmp_path / "cache", original, error=MachineError)


def test_what_a_killed_process_left_is_removed_first(original, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    folder = fill(cache, original)[0].path.parent
    shutil.rmtree(folder)
    ends = (f"{socket.gethostname()}-4194305", f"{socket.gethostname()}-1", "another-9")
    left, reused, other = (cache / f"{folder.name}.partial-{end}" for end in ends)
    for each in (left, reused, other):
        each.mkdir()
        (each / "half").write_bytes(b"x")
    there = []
    monkeypatch.setattr(module, "check_space", lambda *_: there.extend((left.exists(), reused.exists())))
    fill(cache, original)
    assert there == [False, False]  # else what was left may take the room that the copy needs
    assert other.exists()  # the other machine may still write there


def test_another_data_set_of_the_same_name_has_its_own_copy(tmp_path):
    first = make(tmp_path / "a" / "train.beton")
    other = make(tmp_path / "b" / "train.beton", seed=9)
    assert fill(tmp_path, first)[0].path != fill(tmp_path, other)[0].path


def test_other_class_names_have_their_own_copy(tmp_path):
    first = make(tmp_path / "a" / "train.beton")
    changed = {**first.sidecar, "class_names": ["other", *first.class_names[1:]]}
    del changed["seal"]
    renamed = tmp_path / "b" / "train.beton"
    renamed.parent.mkdir()
    shutil.copy(first.path, renamed)
    write_sidecar(sidecar_path(renamed), {**changed, "seal": _seal(changed)})
    other = open_dataset(renamed)
    assert other.content_hash == first.content_hash
    cache = tmp_path / "cache"
    assert [fill(cache, each)[0].class_names for each in (first, other)] == [first.class_names, other.class_names]


def test_both_formats_of_the_same_images_have_their_own_copies(tmp_path):
    first, other = make(tmp_path / "a" / "train.beton"), make(tmp_path / "a" / "train")
    assert first.content_hash == other.content_hash
    for each in (first, other):
        copy, _ = fill(tmp_path / "cache", each)
        assert copy.path.name == each.path.name


def test_a_finished_copy_needs_no_lock(original, tmp_path):
    copy, _ = fill(tmp_path / "cache", original)
    lock = tmp_path / "cache" / f"{copy.path.parent.name}.lock"
    lock.unlink()
    lock.mkdir()  # cannot be opened for writing, as in a read-only folder or in another user's
    again, said = fill(tmp_path / "cache", original)
    assert (again.path, said) == (copy.path, [])


def test_without_checksums_there_is_no_copy(tmp_path):
    original = make(tmp_path / "train.beton")
    sidecar_path(original.path).unlink()
    refused(r"has no checksums, so a copy .* --data\.cache_dir", fill, tmp_path / "cache", open_dataset(original.path))


def test_a_copy_that_somebody_changed_is_refused(original, tmp_path):
    copy, _ = fill(tmp_path / "cache", original)
    if copy.path.is_dir():
        shutil.rmtree(copy.path)
    else:
        copy.path.unlink()
    refused(r"delete the folder .*, and the next run copies it again", fill, tmp_path / "cache", original)
