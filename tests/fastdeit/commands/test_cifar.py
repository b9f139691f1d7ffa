"""CIFAR-10 from its own archive, with the commands of docs/own-data.md and a model that this project trained before."""

import json
import re
import shlex
from pathlib import Path

import pytest

from archives import write_cifar
from forked import run_module, succeed
from runs import train

PAGE = Path(__file__).parents[3] / "docs" / "own-data.md"
SMALL = (
    "--model.img_size 32 --model.patch_size 8 --model.embed_dim 48 --model.depth 2 --model.num_heads 2 "
    "--run.epochs 1 --run.global_batch 10 --optim.warmup_epochs 0 --run.device cpu --data.loader torch"
)


@pytest.mark.slow
def test_the_commands_of_the_page(tiny, tmp_path, monkeypatch):
    section = PAGE.read_text().partition("### CIFAR-10 from its archive")[2]
    commands = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].replace("\\\n", " ").splitlines()
    assert [shlex.split(command)[1] for command in commands] == ["convert", "convert", "train", "eval"]
    train(tiny(model={"distilled": False}, run={"epochs": 1, "output": tmp_path / "runs" / "deit_tiny"}))
    write_cifar(tmp_path, "10")
    monkeypatch.chdir(tmp_path)
    more = {"train": SMALL, "eval": "--device cpu --loader torch --json"}
    for command in commands:
        words = [*shlex.split(command)[1:], *shlex.split(more.get(shlex.split(command)[1], ""))]
        out, _ = succeed(run_module, "fastdeit", words)
    scores = json.loads(out)["model"]
    assert scores["images"] == 6
    assert scores.keys() == {"images", "class", "20-nn", "linear probe"}
    recipe = json.loads((tmp_path / "runs" / "cifar" / "recipe.json").read_text())
    assert recipe["model"]["num_classes"] in (None, 10)
