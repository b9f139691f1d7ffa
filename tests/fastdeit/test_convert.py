"""`fastdeit-convert` as it is called."""

import subprocess
import sys

import pytest

from fastdeit.pipelines.beton import BetonDataset


def call(*arguments):
    command = [sys.executable, "-m", "fastdeit.convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_converts_and_reports(images, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("class3\nclass2\nclass1\nclass0\n")
    done = call(images, tmp_path / "val.beton", "--split", "val", "--class-names", names, "--limit", 40)
    assert done.returncode == 0, done.stderr
    assert "val.beton: 40 images in 4 classes" in done.stdout
    assert "40 passed through" in done.stdout
    with BetonDataset(tmp_path / "val.beton") as dataset:
        assert dataset.class_names == ["class3", "class2", "class1", "class0"]
        assert dataset.label[0] == 3


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        (["torchvision:CIFAR10:nowhere"], "torchvision does not find or open it there"),
        (["images", "--split", "test"], "there is no such folder"),
        (["images", "--class-names", "none.txt"], "none.txt"),
        (["images", "--split", "val", "--quality", "200"], "quality 200"),
    ],
)
def test_mistakes_are_one_sentence(images, tmp_path, arguments, reason):
    arguments = [str(images) if word == "images" else word for word in arguments]
    done = call(arguments[0], tmp_path / "x.beton", *arguments[1:])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert reason in done.stderr
