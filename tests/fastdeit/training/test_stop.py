"""A signal ends a run after the step, with a checkpoint; the resumed run has the bits of an uninterrupted one."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

import steps
from elastic import logged
from fastdeit import checkpoint, cli
from fastdeit.distributed import World
from fastdeit.pipelines.machine import MachineError
from fastdeit.signals import REQUEUE, StopSignals
from fastdeit.training import stop
from fastdeit.training.stop import Stop
from runs import assert_same_state, final_state, trained
from system import run, wait_for

ALONE = World(0, 1, 1, torch.device("cpu"))


def steps_logged(recipe, events):
    return [event["global_step"] for event in events(recipe.run.output, "train")]


@pytest.fixture
def straight(tiny, tmp_path, launch):
    """Function: the final state of an uninterrupted run, and its recipe with another folder."""

    def launched(processes=1, **run):
        straight, stopped = (
            tiny(
                model={"drop_path": 0.3, "drop_rate": 0.1},
                run={"epochs": 6, "eval_every": 6, **run, "output": tmp_path / name},
            )
            for name in ("straight", "stopped")
        )
        launch(straight, processes)
        return final_state(straight), stopped

    return launched


@pytest.mark.slow
def test_no_step_is_lost_or_done_twice(straight, launch, events):
    expected, recipe = straight()
    rng, kinds = random.Random(1), (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    for number in kinds:
        target = logged(recipe) + rng.randint(2, 5)
        process = launch(recipe, wait=False)
        wait_for(lambda target=target: logged(recipe) >= target, process)
        os.kill(process.pid, number)
        assert process.wait(60) == (130 if number == signal.SIGINT else REQUEUE)
        out, err = process.communicate()
        assert f"{number.name}: stopping after this step" in err
        assert f"stopped by {number.name} at epoch" in out
        assert "Traceback" not in err
        newest = checkpoint.found(recipe.run.output / "checkpoints")[0]
        assert checkpoint.load(newest)["global_step"] == steps_logged(recipe, events)[-1]
    process = launch(recipe)
    assert [event["signal"] for event in events(recipe.run.output, "stopped")] == [number.name for number in kinds]
    assert steps_logged(recipe, events) == sorted(set(steps_logged(recipe, events)))
    assert_same_state(expected, final_state(recipe))


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(straight, launch, events):
    expected, recipe = straight(processes=2, checkpoint_every=1)
    process = launch(recipe, 2, wait=False)
    wait_for(lambda: logged(recipe) >= 4, process)
    worker = psutil.Process(process.pid).children()[-1]
    worker.send_signal(signal.SIGUSR1)
    assert process.wait(120) != 0
    (stopped,) = events(recipe.run.output, "stopped")
    newest = checkpoint.found(recipe.run.output / "checkpoints")[0]
    assert checkpoint.load(newest)["global_step"] == stopped["global_step"]
    process = launch(recipe, 2)
    assert steps_logged(recipe, events) == sorted(set(steps_logged(recipe, events)))
    assert_same_state(expected, final_state(recipe))


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step(tmp_path):
    for asked_at in (5, 8):
        results = steps.in_two_processes(steps.stop_when_one_is_asked, tmp_path, asked_at)
        assert results[0] == results[1]
        assert asked_at <= results[0] <= asked_at + stop.VOTE_EVERY + 1


@pytest.fixture
def signals():
    with StopSignals() as listening:
        yield listening


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_the_first_step_a_signal_ends_the_program_at_once(signals, number, capfd):
    with pytest.raises(SystemExit, match=str(REQUEUE)):
        signal.raise_signal(number)
    assert f"{number.name}: stopped" in capfd.readouterr().err


def test_ctrl_c_before_the_first_step_is_that_of_any_program(signals):
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_second_signal_does_not_wait_for_the_step(signals, monkeypatch):
    clock = itertools.count(100.0, 0.6)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    deciding = Stop(ALONE, signals)
    deciding.stepping(True)
    assert deciding.due(1) is None
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)  # 0.6 s later: torchrun passed it on as well
    assert deciding.due(2) == "stop"
    assert deciding.reason == "SIGTERM"
    with pytest.raises(SystemExit, match=str(REQUEUE)):
        signal.raise_signal(signal.SIGTERM)


def test_the_clock_asks_for_a_checkpoint(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    deciding = Stop(ALONE, None, minutes=2)
    assert deciding.due(1) is None
    now += 120
    assert deciding.due(2) == "save"
    deciding.saved()
    assert deciding.due(3) is None
    assert Stop(ALONE, None).due(1) is None  # 0 minutes: never


def full_disk(monkeypatch, times):
    """Make writing the next `times` checkpoints fail."""
    save, failed = checkpoint.save, []

    def save_or_fail(path, state):
        if len(failed) < times:
            failed.append(path)
            raise MachineError(f"{path}: cannot be written: No space left on device")
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", save_or_fail)
    return failed


@pytest.mark.slow
def test_a_full_disk_does_not_end_the_run_if_it_is_mended(tiny, tmp_path, events, monkeypatch):
    run = {"epochs": 3, "checkpoint_every": 2, "keep_checkpoints": 9}
    expected = trained(tiny(run={**run, "output": tmp_path / "straight"}))
    failed = full_disk(monkeypatch, times=3)
    recipe = tiny(run={**run, "output": tmp_path / "full"})
    assert_same_state(expected, trained(recipe))
    assert len(failed) == 3
    warned = [event["text"] for event in events(recipe.run.output, "warning")]
    assert sum("Training goes on without a checkpoint" in text for text in warned) == 3
    assert not any(path.exists() for path in failed)


@pytest.mark.slow
def test_the_run_ends_when_its_patience_does_and_if_the_last_checkpoint_fails(tiny, tmp_path, monkeypatch):
    failed = full_disk(monkeypatch, times=99)
    with pytest.raises(MachineError, match="No space left"):
        trained(tiny(run={"epochs": 2, "output": tmp_path / "last"}))
    assert len(failed) == 2
    with pytest.raises(MachineError, match="No space left"):
        trained(tiny(run={"epochs": 9, "checkpoint_patience": 0, "output": tmp_path / "impatient"}))
    assert len(failed) == 3


def test_a_reader_of_stderr_that_is_gone_does_not_end_the_step(signals):
    """As `2>&1 | tee log`, where Ctrl-C ends tee first."""
    signals.stepping = True
    reader, writer = os.pipe()
    os.close(reader)
    kept = os.dup(2)
    os.dup2(writer, 2)
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(writer)
    assert signals.asked is signal.SIGTERM


def test_ctrl_c_that_a_library_swallows_is_still_one(ended):
    def main():
        with StopSignals():
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt as error:
                raise RuntimeError("a callback failed") from error

    assert ended(130, cli.run, main).err == "interrupted\n"


def test_outside_the_main_thread_nothing_is_installed():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: StopSignals().__enter__()._before).result() == {}


def test_a_signal_after_the_checkpoint_changes_nothing(signals):
    deciding = Stop(ALONE, signals)
    deciding.leaving()
    signal.raise_signal(signal.SIGTERM)
    assert deciding.due(1) is None


def test_handlers_are_given_back_and_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGUSR1)
            assert signals.asked is None
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGUSR1, before)


CODE = """
import sys, time
from fastdeit.cli import run
run(lambda: print("begun", flush=True) or time.sleep(60))
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare from util-linux")
def test_the_first_process_of_a_container_hears_sigterm(tmp_path):
    unshare = ["unshare", "--pid", "--fork", "--kill-child"]
    if run(*unshare, "true").returncode:
        pytest.skip("this user may not make a PID namespace")
    process = subprocess.Popen([*unshare, sys.executable, "-c", CODE], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    (first,) = psutil.Process(process.pid).children()
    first.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
