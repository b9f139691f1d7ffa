"""A small data set of photographs-like JPEGs, converted, and recipes that train on it in seconds."""

import json
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fastdeit.config import Recipe
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.recipes import convnet_teacher, deit_tiny_distilled
from forked import Forked, run_module, run_module_twice
from runs import changed, newest, train
from tiny_datasets import copy_beton, reseal

CLASSES = 4
RUN = {"epochs": 2, "global_batch": 32, "log_every": 1, "tensorboard": False, "progress": False, "device": "cpu"}
HOSTILE = ["</script><script>alert(1)//", '"><img src=x onerror=alert(2)>', "\x1b[31mred\u202e", "{{x}} & <b>bold</b>"]


def draw_image(rng, label, size):
    """A blurred noise image with a disc whose colour tells the class."""
    height, width = size
    noise = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).filter(
        ImageFilter.GaussianBlur(3)
    )
    pixels = np.array(noise)
    y, x = np.ogrid[:height, :width]
    cy, cx = rng.uniform(0.3, 0.7, 2) * (height, width)
    disc = (y - cy) ** 2 + (x - cx) ** 2 < (0.3 * min(size)) ** 2
    pixels[disc] = [(230, 30, 30), (30, 220, 40), (40, 40, 230), (230, 220, 30)][label]
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """ImageFolder trees `train` (160 images) and `val` (44)."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("images")
    for split, each in (("train", 40), ("val", 11)):
        for label in range(CLASSES):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(each):
                size = tuple(int(v) for v in rng.integers(36, 60, 2))
                draw_image(rng, label, size).save(folder / f"{i:03d}.jpg", quality=92)
    return root


@pytest.fixture(scope="session")
def data(images, tmp_path_factory):
    """`train.beton` and `val.beton` of `images`."""
    folder = tmp_path_factory.mktemp("beton")
    for split in ("train", "val"):
        convert(str(images / split), folder / f"{split}.beton", progress=False)
    return folder


@pytest.fixture(scope="session")
def tiny_in(data):
    """Function: `tiny` with a folder for the run's output."""

    def on(recipe, sections):
        # A decay without an average has no effect, and a command refuses it.
        return sections.get("ema", {}).get("enabled", recipe.ema.enabled)

    def make(output, base=None, **sections) -> Recipe:
        recipe = (base or deit_tiny_distilled)()
        recipe = changed(
            recipe,
            data={"train": data / "train.beton", "val": data / "val.beton", "threads": 2, "loader": "torch"},
            optim={"warmup_epochs": 1, "lr": 2e-3, "lr_batch": 0},
            ema={"decay": 0.9} if on(recipe, sections) else {},
            run={**RUN, "output": output},
            departures={"mix_group": 8},
        )
        if recipe.model.arch == "deit":
            shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
            recipe = changed(recipe, model=shape, objective={"distillation": "none"})
        else:
            recipe = changed(recipe, model={"arch": "resnet10t", "img_size": 32})
        return changed(recipe, **sections).resolved()

    return make


@pytest.fixture
def tiny(tiny_in, tmp_path):
    """Function: a small recipe with the whole augmentation, its sections overridden by keyword dicts."""
    return partial(tiny_in, tmp_path / "run")


@pytest.fixture(scope="session")
def teacher_checkpoint(tiny_in, tmp_path_factory):
    """A convnet teacher that the project trained on the small data set."""
    recipe = tiny_in(tmp_path_factory.mktemp("teacher"), convnet_teacher, data={"val": None}, run={"epochs": 3})
    train(recipe)
    return newest(recipe)


@pytest.fixture
def taught(teacher_checkpoint):
    """Sections of a recipe that distils hard from that teacher."""
    teacher = {"name": "resnet10t", "checkpoint": teacher_checkpoint}
    return {"objective": {"distillation": "hard"}, "teacher": teacher}


@pytest.fixture(scope="session")
def reported(data, tiny_in, tmp_path_factory):
    """The recipe of a finished run of a distilled student, whose classes have the names of an attacker."""
    folder = tmp_path_factory.mktemp("reported")
    for name in ("train.beton", "val.beton"):
        copy_beton(data / name, folder / name)
        reseal(folder / f"{name}.json", class_names=HOSTILE)
    recipe = changed(tiny_in(folder / "run"), data={"train": folder / "train.beton", "val": folder / "val.beton"})
    train(recipe)
    return recipe


@pytest.fixture
def small_files():
    """Function: files of this process may have so many bytes at most; the system then refuses as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def events():
    """Function: the events of a run's log, of one kind where it is named."""

    def read(folder, kind=None):
        lines = (Path(folder) / "log.jsonl").read_text().splitlines()
        return [e for e in map(json.loads, lines) if kind in (None, e["event"])]

    return read


@pytest.fixture
def launch():
    """Function: run `fastdeit-train` on a recipe in a process of its own, or in two that torchrun joins.

    It ends with `status`, unless nobody waits for it. The processes are forked, unless `stdout_reader` is a command
    that reads what the run prints.
    """
    started = []

    def start(recipe: Recipe, processes=1, *, wait=True, status=0, stdout_reader: str | None = None):
        folder = Path(recipe.run.output)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder.parent / f"{folder.name}.json"
        file.write_text(json.dumps(recipe.to_dict()))
        words = [recipe.name, "--config", str(file)]
        if stdout_reader is None:
            process = Forked(run_module if processes == 1 else run_module_twice, "fastdeit.train", words)
        else:
            command = [sys.executable, "-m", "fastdeit.train", *words]
            command = ["bash", "-c", f'set -o pipefail; "$@" | {stdout_reader}', "bash", *command]
            pipe = subprocess.PIPE if wait else subprocess.DEVNULL
            process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
        started.append(process)
        if wait:
            process.out, process.err = process.communicate(timeout=300)
            assert process.returncode == status, process.err
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
