"""`fastdeit-convert` as it is called."""

import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from PIL import Image

from fastdeit.pipelines.conversion.verify import verify
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
        (["images", "--shard-size", "9"], "--shard-size has no effect without --format webdataset: leave it out"),
        (["images", "--nodes", "2"], "--nodes has no effect without --format webdataset"),
    ],
)
def test_mistakes_are_one_sentence(images, tmp_path, arguments, reason):
    arguments = [str(images) if word == "images" else word for word in arguments]
    done = call(arguments[0], tmp_path / "x.beton", *arguments[1:], status=2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert reason in done.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--limit", "3"], "--limit has no effect with --verify, which converts nothing: leave it out"),
        (["--split", "val"], "--split has no effect without --against"),
        (["--workers", "-1"], "-1 workers: give 0 for all cores, or how many"),
    ],
)
def test_mistakes_in_a_check_are_one_sentence(data, arguments, reason):
    done = call("--verify", data / "val.beton", *arguments, status=2)
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
    of_shards = () if format == "beton" else ("--shard-size", 20, "--nodes", 2)
    command = (tree, dest, "--format", format, *of_shards)
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


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("format", ["beton", "webdataset"])
def test_closed_streams_do_not_get_into_the_data(tmp_path, format, workers):
    """libtiff prints its messages to descriptor 2, whatever file that is."""
    tree, noise = tmp_path / "tree", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for i in range(30):
        file = tree / "ab"[i % 2] / f"{i}.tif"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(file, compression="tiff_lzw")
        if i % 3 == 0:
            data = file.read_bytes()
            file.write_bytes(data[:200] + bytes(byte ^ 0xFF for byte in data[200:-400]) + data[-400:])
    dest = tmp_path / ("x.beton" if format == "beton" else "x")
    words = [str(tree), str(dest), "--format", format, "--on-error", "skip", "--workers", str(workers)]
    command = [sys.executable, "-m", "fastdeit.commands.convert", *words]
    done = subprocess.run(["bash", "-c", '"$@" >&- 2>&-', "bash", *command], check=False, timeout=120)
    assert done.returncode == 3
    assert verify(dest, progress=False).ok


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
