"""Images that are converted on first use; the judge is `convert` itself."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
from unittest.mock import Mock

import pytest
from PIL import Image

import fastdeit
from fastdeit.inputs import open_dataset
from fastdeit.on_demand import converted, with_converted_data
from fastdeit.pipelines.conversion.journal import Journal
from fastdeit.pipelines.formats.beton_layout import sidecar_path
from fastdeit.pipelines.formats.local_copy import local_copy
from forked import Forked
from refusals import refused
from system import run_python, wait_for
from tiny_datasets import linked


def beton_files(cache):
    return sorted(cache.glob("*.beton"))


@pytest.mark.slow
def test_a_folder_is_converted_once_and_again_when_it_changes(images, data, tmp_path, capfd):
    tree, cache = tmp_path / "photos", tmp_path / "cache"
    shutil.copytree(images / "train", tree)
    first = converted(tree, cache)
    assert f"{tree} is converted to {first}, this once (160 images)" in capfd.readouterr().err
    made = first.stat()
    assert first.read_bytes() == (data / "train.beton").read_bytes()
    assert converted(tree, cache) == first
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == (made.st_mtime_ns, made.st_ino)
    assert "is converted" not in capfd.readouterr().err
    (tree / "class0" / "000.jpg").write_bytes((tree / "class0" / "001.jpg").read_bytes())
    second = converted(tree, cache)
    assert second != first
    assert beton_files(cache) == sorted((first, second))


def test_what_a_conversion_wrote_is_taken_as_it_is(data, tmp_path):
    cache = tmp_path / "cache"
    assert converted(data / "train.beton", cache) == data / "train.beton"
    assert converted(tmp_path / "none", cache) == tmp_path / "none"
    assert not cache.exists()


@pytest.mark.slow
def test_a_finished_data_set_needs_no_lock(images, tmp_path):
    made = converted(images / "val", tmp_path / "cache")
    lock = made.with_name(f"{made.name}.lock")
    lock.unlink()
    lock.mkdir()  # cannot be opened for writing, as in a read-only folder or in another user's
    assert converted(images / "val", tmp_path / "cache") == made


@pytest.mark.slow
def test_processes_that_come_together_convert_once(images, tmp_path):
    cache = tmp_path / "cache"
    processes = [Forked(converted, images / "val", cache) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("is converted to" in err for err in errors) == 1
    assert len(beton_files(cache)) == 1


CODE = "import sys; from pathlib import Path; from fastdeit.on_demand import converted; " \
    "converted(Path(sys.argv[1]), Path(sys.argv[2]))"  # fmt: skip


@pytest.fixture
def begin(tmp_path):
    """Function: begin to convert many images, and return the process once its journal has that many lines."""

    def begun(cache, lines):
        # Large images, so that the conversion takes longer than the two seconds between the lines of its journal.
        Image.linear_gradient("L").resize((2400, 2400)).convert("RGB").save(tmp_path / "large.jpg")
        tree = linked(tmp_path / "large.jpg", tmp_path / "many", 3000, 3)
        # On a busy machine, the conversion must not end before this process sees that it has begun.
        command = ["nice", "-n", "19", sys.executable, "-c", CODE, str(tree), str(cache)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        wait_for(lambda: any(path.read_bytes().count(b"\n") >= lines for path in cache.glob("*.journal")), process)
        return tree, process

    return begun


@pytest.mark.slow
def test_a_conversion_that_outlives_its_run_is_waited_for(begin, tmp_path, capfd):
    """A run that is killed cannot end the program that converts for it."""
    tree, process = begin(tmp_path / "cache", 1)
    process.kill()
    process.wait()
    made = converted(tree, tmp_path / "cache")
    process.communicate(timeout=60)
    assert f"waiting for another process to convert to {made}" in capfd.readouterr().err
    assert len(open_dataset(made)) == 3000


@pytest.mark.slow
def test_an_interrupted_conversion_goes_on(begin, tmp_path):
    cache = tmp_path / "cache"
    tree, process = begin(cache, 2)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert beton_files(cache) == []
    done = run_python("-c", CODE, tree, cache, status=0)
    assert "continued after" in done.stderr
    assert len(open_dataset(beton_files(cache)[0])) == 3000


def test_a_class_that_the_training_set_lacks_and_a_split_are_explained(data, images, tmp_path):
    shutil.copytree(images / "val", tmp_path / "val")
    (tmp_path / "val" / "class1").rename(tmp_path / "val" / "other")
    listed = r"class 'other' is not in the list of class names: .*\. The list holds the classes of .*train\.beton"
    refused(listed, converted, tmp_path / "val", tmp_path / "cache", data / "train.beton")
    (tmp_path / "empty").mkdir()
    message = refused("no class folders in it", converted, tmp_path / "empty", tmp_path / "cache", data / "train.beton")
    assert "The list holds" not in message
    refused(r"choose one with --split\. Only fastdeit-convert has it", converted, images, tmp_path / "cache")


@pytest.mark.slow
def test_bad_images_are_named(images, tmp_path, capfd):
    tree = tmp_path / "photos"
    shutil.copytree(images / "val", tree)
    (tree / "class1" / "bad.jpg").write_bytes(b"no image")
    refused("photos could not be converted, for the reason above", converted, tree, tmp_path / "cache")
    assert "bad.jpg" in capfd.readouterr().err
    assert beton_files(tmp_path / "cache") == []


@pytest.mark.slow
def test_a_conversion_that_cannot_go_on_can_start_again(images, tmp_path, capfd):
    """The interrupted one ran with another Pillow."""
    made = converted(images / "val", tmp_path / "cache")
    expected = made.read_bytes()
    for file in (made, sidecar_path(made)):
        file.unlink()
    partial, journal = (made.with_name(f"{made.name}.{end}") for end in ("partial", "journal"))
    with Journal(journal) as begun:
        begun.begin({"options": {"pillow": "9.0"}})
    partial.touch()
    refused(f"delete {journal} and {partial} to start again", converted, images / "val", tmp_path / "cache")
    for file in (journal, partial):
        file.unlink()
    assert converted(images / "val", tmp_path / "cache").read_bytes() == expected


@pytest.mark.slow
def test_a_run_takes_folders_and_archives(tiny, images, tmp_path, launch, events):
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        for number, path in enumerate(sorted((images / "val").rglob("*.jpg"))):
            archive.add(path, f"{number:06d}.jpg")
            label = tmp_path / "label"
            label.write_text(path.parent.name[-1])
            archive.add(label, f"{number:06d}.cls")
    cache = tmp_path / "cache"
    recipe = tiny(data={"train": images / "train", "val": tmp_path / "val.tar", "cache_dir": cache}, run={"epochs": 1})
    launch(recipe)
    assert len(beton_files(cache)) == 2  # and no copies of them
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    assert events(recipe.run.output, "eval")[-1]["images"] == 44
    again = with_converted_data(recipe)
    assert sorted((again.data.train, again.data.val)) == beton_files(cache)


@pytest.mark.slow
def test_a_script_without_a_guard_may_open_a_folder(images, tmp_path):
    """Worker processes of a conversion in the script's own process would run the script again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, fastdeit\n"
        "loader = fastdeit.create_loader(sys.argv[1], 'deit_tiny', batch_size=32, img_size=32, device='cpu')\n"
        "print(len(loader), next(iter(loader))[0].shape)\n"
    )
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = run_python(script, images / "train", env=environ)
    assert done.stdout == "5 torch.Size([32, 3, 32, 32])\n", done.stderr
    assert len(beton_files(tmp_path / "cache" / "fastdeit")) == 1


def test_a_data_set_in_the_cache_is_not_copied_again(data):
    dataset = open_dataset(data / "train.beton")
    assert local_copy(dataset, data, print) is dataset


def test_the_loader_names_what_it_cannot_convert(tmp_path):
    (tmp_path / "empty").mkdir()
    refused("no class folders in it", fastdeit.create_loader, tmp_path / "empty", batch_size=8)


def test_a_user_without_a_home_is_told(images, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", Mock(side_effect=KeyError(0)))
    refused("no home folder to keep converted images in: set XDG_CACHE_HOME", converted, images / "val")
