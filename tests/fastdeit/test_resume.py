"""Resume: killed at random moments, the run ends with the same bits; mismatches are refused."""

import os
import random
import signal
import time

import pytest
import torch

from fastdeit import checkpoint
from fastdeit.cli import UserError
from fastdeit.distributed import world
from fastdeit.trainer import Trainer

KILLS = 10


def final_state(recipe):
    return checkpoint.load(checkpoint.found(recipe.run.output / "checkpoints")[0])


def flat(value, prefix=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}/{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from flat(inner, f"{prefix}/{i}")
    else:
        yield prefix, value


def assert_same_bits(a, b):
    first, second = dict(flat(a)), dict(flat(b))
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[key]), key
        elif not key.startswith("/recipe/run/output"):
            assert value == second[key], key


def run_in_child(recipe):
    """Train in a forked process; its exit status. The parent has started no threads that matter."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with world("cpu") as joined:
                Trainer(recipe, joined).run()
            status = 0
        finally:
            os._exit(status)
    return child


def test_killed_ten_times_and_resumed(tiny, teacher_checkpoint, tmp_path, events):
    torch.set_num_threads(1)
    options = {
        "objective": {"distillation": "hard"},
        "teacher": {"name": "resnet10t", "checkpoint": teacher_checkpoint},
        "model": {"drop_path": 0.3, "drop_rate": 0.1},
    }
    run = {"epochs": 12, "checkpoint_every": 3, "eval_every": 12}
    straight = tiny(**options, run={**run, "output": tmp_path / "straight"})
    _, status = os.waitpid(run_in_child(straight), 0)
    assert status == 0

    killed = tiny(**options, run={**run, "output": tmp_path / "killed"})
    rng, kills = random.Random(3), 0
    while True:
        child = run_in_child(killed)
        before = len(events(killed.run.output, "train")) if (killed.run.output / "log.jsonl").exists() else 0
        if kills < KILLS:
            # Wait until the run trains again, then kill it after a random while.
            target = before + rng.randint(1, 9)
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                log = killed.run.output / "log.jsonl"
                if log.exists() and log.read_text().count('"event": "train"') >= target:
                    break
                if os.waitpid(child, os.WNOHANG)[0]:
                    pytest.fail("the run ended before it could be killed")
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            continue
        _, status = os.waitpid(child, 0)
        assert status == 0
        break
    resumes = events(killed.run.output, "resume")
    assert len(resumes) >= 5
    assert any(e["step"] for e in resumes)  # in the middle of an epoch
    assert_same_bits(final_state(straight), final_state(killed))


def test_another_recipe_is_refused(tiny):
    first = tiny(run={"epochs": 1})
    with world("cpu") as joined:
        Trainer(first, joined).run()
        with pytest.raises(UserError, match=r"optim\.lr = 0\.002, this run has 0\.001"):
            Trainer(tiny(run={"epochs": 1}, optim={"lr": 1e-3}), joined).run()
        with pytest.raises(UserError, match="holds checkpoints"):
            Trainer(tiny(run={"epochs": 1, "resume": "none"}), joined).run()
        with pytest.raises(UserError, match="no such checkpoint"):
            Trainer(tiny(run={"epochs": 1, "resume": "elsewhere.pt"}), joined).run()
        # What changes no pixel and no update may change.
        Trainer(tiny(run={"epochs": 1, "log_every": 3}, data={"threads": 1, "prefetch": 1}), joined).run()


def test_other_data_is_refused(tiny, images, tmp_path):
    from fastdeit.pipelines.convert import convert

    first = tiny(run={"epochs": 1})
    convert(str(images / "train"), tmp_path / "other.beton", shuffle_seed=5, progress=False)
    with world("cpu") as joined:
        Trainer(first, joined).run()
        with pytest.raises(UserError, match="another data set"):
            Trainer(tiny(run={"epochs": 1}, data={"train": tmp_path / "other.beton"}), joined).run()
