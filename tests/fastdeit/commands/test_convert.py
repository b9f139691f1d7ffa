"""`fastdeit-convert` as it is called."""

import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from fastdeit.pipelines.formats.beton import BetonDataset
from forked import Forked, run_module
from system import wait_for

pytestmark = pytest.mark.slow


def call(*arguments, status=0):
    process = Forked(run_module, "fastdeit.commands.convert", [str(argument) for argument in arguments])
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, out + err
    return SimpleNamespace(stdout=out, stderr=err)


def test_converts_and_reports(images, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("class3\nclass2\nclass1\nclass0\n")
    done = call(images, tmp_path / "val.beton", "--split", "val", "--class-names", names, "--limit", 40)
    assert "val.beton: 40 images in 4 classes" in done.stdout
    assert "40 passed through" in done.stdout
    with BetonDataset(tmp_path / "val.beton") as dataset:
        assert dataset.class_names == ["class3", "class2", "class1", "class0"]
        assert dataset.label[0] == 3


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        (["torchvision:CIFAR10:nowhere"], "torchvision cannot find or open it there"),
        (["images", "--split", "test"], "there is no such folder"),
        (["images", "--class-names", "none.txt"], "none.txt"),
        (["images", "--split", "val", "--quality", "200"], "quality 200"),
        (["images", "--split", "val", "--on-error", "fail", "--against", "x"], "give SOURCE and DEST, or --verify"),
        (["images", "--verify", "x.beton"], "give the source to compare with as --against"),
    ],
)
def test_mistakes_are_one_sentence(images, tmp_path, arguments, reason):
    arguments = [str(images) if word == "images" else word for word in arguments]
    done = call(arguments[0], tmp_path / "x.beton", *arguments[1:], status=2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert reason in done.stderr


def test_no_arguments_and_help():
    done = call(status=2)
    assert done.stderr.count("\n") == 1
    assert "--help" in done.stderr
    done = call("--help")
    for word in ("imagenet:PATH", "webdataset:PATTERN", "--on-error", "--resume", "--verify", "Exit status"):
        assert word in done.stdout


@pytest.mark.parametrize("format", ["beton", "webdataset"])
def test_statuses_rejects_and_verification(images, tmp_path, format):
    tree = shutil.copytree(images / "val", tmp_path / "tree")
    bad = tree / "class1" / "003.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:100])
    dest = tmp_path / ("val.beton" if format == "beton" else "val")
    command = (tree, dest, "--format", format, "--shard-size", 20, "--nodes", 2)
    done = call(*command, status=2)
    assert f"error: {bad}, sample 14: cannot be converted" in done.stderr
    assert not dest.exists()
    done = call(*command, "--on-error", "skip", "--resume", status=3)
    for word in (
        "43 images",
        f"left out: 1, listed in {dest}.rejects.jsonl",
        f"    {bad}: ",
        "continued after 14 images",
    ):
        assert word in done.stdout
    assert len((tmp_path / f"{dest.name}.rejects.jsonl").read_text().splitlines()) == 1
    done = call("--verify", dest, "--against", tree)
    assert "43 images checked" in done.stdout
    bad.write_bytes(whole)
    done = call("--verify", dest, "--against", tree, status=3)
    assert f"{bad}, sample 14 of the source: was left out, but can be read now" in done.stdout
    call("--verify", tmp_path / "none", status=2)


def test_class_names_of_a_converted_data_set(images, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("class3\nclass1\nclass0\nclass2\n")
    one, two = tmp_path / "one", tmp_path / "two.beton"
    call(images, one, "--split", "val", "--format", "webdataset", "--class-names", names)
    call(images, two, "--split", "val", "--class-names", one)
    with BetonDataset(two) as dataset:
        assert dataset.class_names == ["class3", "class1", "class0", "class2"]
    call(images, tmp_path / "three", "--split", "val", "--class-names", two, "--limit", 4)
    (tmp_path / "two.beton.json").unlink()
    done = call(images, tmp_path / "four", "--split", "val", "--class-names", two, status=2)
    assert "two.beton: has no sidecar with class names" in done.stderr


@pytest.mark.parametrize("delay", [0.0, 0.2, 0.5])
def test_ctrl_c_while_workers_start(images, tmp_path, delay):
    """A terminal sends it to all of them, and each spends its first second importing."""
    command = [sys.executable, "-m", "fastdeit.commands.convert", str(images / "train"), str(tmp_path / "x.beton")]
    process = subprocess.Popen(
        [*command, "--workers", "4"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
    )
    wait_for(lambda: len(psutil.Process(process.pid).children()) > 1)  # the first one only cleans up after the others
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said
