"""Resume: killed at random moments, the run ends with the same bits; mismatches are refused."""

import contextlib
import itertools
import json
import random
import signal
import time

import psutil
import pytest
import torch

from fastdeit import checkpoint
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.sections import COMPAT_RUN
from fastdeit.training.rounding import rounding_changes
from refusals import refused
from runs import assert_same_state, evaluated, final_state, newest, rewind, train, trained
from system import wait_for


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_at_random_moments_and_resumed(tiny, taught, tmp_path, events, launch, pytestconfig, processes):
    """SIGKILL and SIGTERM in turn; `--kills 50` makes a campaign of 50 of each."""
    kills = pytestconfig.getoption("--kills")
    options = {**taught, "model": {"drop_path": 0.3, "drop_rate": 0.1}}
    epochs = 4 + kills
    run = {"epochs": epochs, "checkpoint_every": 3, "eval_every": epochs, "log_every": 2}
    straight = tiny(**options, run={**run, "output": tmp_path / "straight"})
    process = launch(straight, processes)

    stopped = tiny(**options, run={**run, "output": tmp_path / "stopped"})
    rng = random.Random(processes)
    log = stopped.run.output / "log.jsonl"

    def done():
        lines = log.read_text().split("\n")[:-1] if log.exists() else []  # the last one may be half written
        steps = [event["global_step"] for event in map(json.loads, lines) if event["event"] == "train"]
        return steps[-1] if steps else 0

    lost = {signal.SIGKILL: [], signal.SIGTERM: []}
    for _, number in zip(range(kills), itertools.cycle(lost), strict=False):
        # Once the run trains again, it gets a random number of steps and a random moment more.
        target = done() + rng.randint(1, 6)
        process = launch(stopped, processes, wait=False)
        wait_for(lambda target=target: done() >= target, process)
        time.sleep(rng.uniform(0, 0.05))
        stop(process.pid, number, rng)
        process.wait(120)
        if process.returncode == 0:  # the end came first
            break
        written = checkpoint.found(stopped.run.output / "checkpoints")
        lost[number].append(done() - (checkpoint.steps_of(written[0]) if written else 0))
    process = launch(stopped, processes)
    for number, each in lost.items():
        print(f"{number.name}, {processes} processes, {len(each)} stops, steps lost: {each}")
    assert max(lost[signal.SIGTERM]) <= 0
    assert max(lost[signal.SIGKILL]) <= 2 * run["checkpoint_every"]
    lines, expected = (events(recipe.run.output, "train") for recipe in (stopped, straight))
    assert [line["global_step"] for line in lines] == [line["global_step"] for line in expected]
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
    assert_same_state(final_state(straight), final_state(stopped))


def stop(pid, number, rng):
    """Send a signal to a run: SIGTERM to its first process, SIGKILL to all or, under torchrun, to a worker."""
    first = psutil.Process(pid)
    workers = first.children()
    if number == signal.SIGTERM:
        targets = [first]
    else:
        targets = [rng.choice(workers)] if workers and rng.random() < 0.5 else [first, *workers]
    for target in targets:
        with contextlib.suppress(psutil.NoSuchProcess):
            target.send_signal(number)


@pytest.mark.slow
def test_another_recipe_is_refused(tiny, events):
    first = tiny(run={"epochs": 1})
    train(first)
    refused(r"optim\.lr = 0\.002, this run has 0\.001", train, tiny(run={"epochs": 1}, optim={"lr": 1e-3}))
    refused("holds checkpoints", train, tiny(run={"epochs": 1, "resume": "none"}))
    refused("no such checkpoint", train, tiny(run={"epochs": 1, "resume": "elsewhere.pt"}))
    # Asked for, a change is taken and told.
    train(tiny(run={"epochs": 2, "resume_changed": True}, optim={"lr": 1e-3}))
    change = events(first.run.output, "resume")[-1]["changed"]
    assert change == ["run.epochs = 1, this run has 2", "optim.lr = 0.002, this run has 0.001"] or len(change) == 2
    # What changes no pixel and no update may change.
    again = tiny(run={"epochs": 2, "log_every": 3}, optim={"lr": 1e-3}, data={"threads": 1, "prefetch": 1})
    scores = train(again)
    assert scores["model"]["images"] == 44  # a finished run still tells its accuracy


@pytest.mark.slow
def test_going_back_needs_the_later_checkpoints_gone(tiny):
    recipe = tiny(run={"epochs": 3})
    train(recipe)
    later, earlier = checkpoint.found(recipe.run.output / "checkpoints")
    back = tiny(run={"epochs": 3, "resume": str(earlier)})
    refused("later than", train, back)
    later.unlink()
    train(back)
    assert later.exists()


@pytest.mark.slow
def test_a_run_that_began_from_another_runs_checkpoint_goes_on_from_its_own(tiny, tiny_in, tmp_path, events):
    """torchrun and a scheduler start a run again with the same command."""
    train(tiny(run={"epochs": 3, "keep_checkpoints": 3}))
    end, _, first = checkpoint.found(tmp_path / "run" / "checkpoints")
    recipe = tiny_in(tmp_path / "other", run={"epochs": 3, "resume": str(first), "keep_checkpoints": 3})
    train(recipe)
    own = checkpoint.found(recipe.run.output / "checkpoints")
    own[0].unlink()
    train(recipe)
    assert [event["path"] for event in events(recipe.run.output, "resume")] == [str(first), str(own[1])]
    assert_same_state(final_state(recipe), torch.load(end, weights_only=True))
    earlier = tiny_in(tmp_path / "other", run={"epochs": 3, "resume": str(own[1])})
    refused(r"later than .* continue from them with --run\.resume auto", train, earlier)


@pytest.mark.slow
def test_what_auto_became_is_compared(tiny, data):
    pytest.importorskip("ffcv")
    first = tiny(run={"epochs": 1})
    train(first)
    refused(
        r"another data\.loader \(pixels\) \(pillow, this run has ffcv\)",
        train,
        tiny(run={"epochs": 1}, data={"loader": "ffcv"}),
    )
    refused(r"another run\.precision \(fp32, this run has bf16\)", train, tiny(run={"epochs": 1, "precision": "bf16"}))


@pytest.mark.slow
def test_a_run_that_drew_each_skipped_sample_on_its_own_is_refused(tiny):
    """Earlier versions' checkpoints name the same mode, but not the kind of draw."""
    skips = tiny(run={"epochs": 1}, model={"drop_path_mode": "skip"})
    state = trained(skips)
    train(skips)  # its own checkpoint resumes
    del state["effective"]["draw of stochastic depth"]
    torch.save(state, newest(skips))
    refused(r"another draw of stochastic depth \(None, this run has a fixed number", train, skips)
    train(tiny(run={"epochs": 1, "resume_changed": True}, model={"drop_path_mode": "skip"}))


def test_other_data_is_refused(tiny, images, tmp_path):
    first = tiny(run={"epochs": 1})
    convert(str(images / "train"), tmp_path / "other.beton", shuffle_seed=5, progress=False)
    train(first)
    refused(r"another data\.train", train, tiny(run={"epochs": 1}, data={"train": tmp_path / "other.beton"}))


@pytest.mark.slow
def test_resuming_on_another_device_or_version_warns(tiny, events):
    def warned():
        return [e["text"] for e in events(recipe.run.output, "warning") if "last bits" in e["text"]]

    recipe = tiny(run={"epochs": 1, "checkpoint_every": 3})
    train(recipe)
    rewind(recipe, 3)
    train(recipe)
    assert warned() == []
    rewind(recipe, 3)
    state = checkpoint.load(newest(recipe))
    now = dict(state["rounding"])
    assert {"device", "CPU threads", "torch", "pillow"} <= now.keys()
    state["rounding"].update(device="NVIDIA X\x1b", torch="1.0")
    torch.save(state, newest(recipe))
    train(recipe)
    (text,) = warned()
    assert f"device NVIDIA X\x1b (now {now['device']}), torch 1.0 (now {now['torch']}): the last bits" in text
    assert checkpoint.load(newest(recipe))["rounding"] == now  # those of the last step
    assert rounding_changes({**now, "device": "x", "CPU threads": 4}, {**now, "CPU threads": None}) == [
        f"device x (now {now['device']})"
    ]
    assert rounding_changes({**now, "triton": None}, {**now, "triton": "3"}) == ["triton missing (now 3)"]
    train(recipe)  # no step is left
    del state["rounding"]  # an older version's
    rewind(recipe, 3)
    torch.save(state, newest(recipe))
    train(recipe)
    assert len(warned()) == 1


@pytest.mark.slow
def test_a_checkpoint_with_an_older_versions_recipe_goes_on(tiny):
    """It holds three of the run's fields as departures, and does not say from where its steps are counted."""
    recipe = tiny(run={"epochs": 1})
    train(recipe)
    path = newest(recipe)
    state = checkpoint.load(path)
    stored = state["recipe"]
    for name in COMPAT_RUN["paper"]:
        stored["departures"][name] = stored["run"].pop(name)
    del state["counted_from"]
    torch.save(state, path)
    train(recipe)
    refused(
        r"run\.loss_sync = deferred, this run has every_step", train, tiny(run={"epochs": 1, "loss_sync": "every_step"})
    )
    scores = evaluated(checkpoint=path, val=recipe.data.val, device="cpu", loader="torch")
    assert scores["model"]["images"] == 44
