"""Every Python example of docs/python.md and of the README runs, on small data and a small model."""

import os
import re
import shutil
from pathlib import Path

import pytest

from runs import newest, train

ROOT = Path(__file__).parents[2]
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
EXAMPLES = PYTHON.findall((ROOT / "docs" / "python.md").read_text())


@pytest.fixture
def folder(data, images, tmp_path, monkeypatch):
    """A working folder with the files that the examples name."""
    for split in ("train", "val"):
        for file in data.glob(f"{split}.beton*"):
            os.link(file, tmp_path / file.name)
    shutil.copy(images / "val" / "class0" / "000.jpg", tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_training_loop(folder, capsys):
    (loop,) = (code for code in EXAMPLES if "create_loader" in code)
    sizes = "SIZE, BATCH, EPOCHS = 224, 256, 300"
    assert sizes in loop
    exec(loop.replace(sizes, "SIZE, BATCH, EPOCHS = 32, 64, 2"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["epoch 0", "epoch 1"]
    assert (folder / "last.pt").exists()


@pytest.mark.slow
def test_a_checkpoint_as_a_classifier(folder, tiny, capsys):
    recipe = tiny(run={"epochs": 1})
    train(recipe)
    shutil.copy(newest(recipe), folder / "checkpoint.pt")
    capsys.readouterr()
    (code,) = (code for code in EXAMPLES if "fastdeit.load(" in code)
    exec(code, {})
    assert re.fullmatch(r"class\d \d+%\n", capsys.readouterr().out)


def test_no_example_is_left_out():
    assert len(EXAMPLES) == 2


@pytest.mark.slow
def test_the_readmes_example(folder, capsys):
    (code,) = PYTHON.findall((ROOT / "README.md").read_text())
    exec(code.replace("batch_size=256", "batch_size=32").replace(".cuda()", ""), {})
    assert capsys.readouterr().out == "[]\n"
