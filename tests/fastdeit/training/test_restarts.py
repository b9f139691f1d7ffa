"""A process that is killed, stopped or hangs is named, and the job goes on from the last checkpoint, bit-equal."""

import signal
import time
from functools import partial

import psutil
import pytest

from elastic import elastic, kill_tree, logged, starter, words_of, workers
from runs import assert_same_state, final_state
from system import wait_for

pytestmark = pytest.mark.slow

RUN = {"epochs": 3, "eval_every": 3, "checkpoint_every": 1, "keep_checkpoints": 1}


@pytest.fixture
def start():
    """Function: start torchrun on a recipe, with two processes."""
    with starter() as starting:
        yield partial(starting, nproc_per_node=2)


@pytest.fixture(scope="module")
def undisturbed(tiny_in, tmp_path_factory):
    """The recipe of a run on two processes that has ended."""
    recipe = tiny_in(tmp_path_factory.mktemp("undisturbed") / "run", run=RUN)
    elastic(words_of(recipe), nproc_per_node=2).finish()
    return recipe


@pytest.fixture
def straight(undisturbed):
    """The final state of a run that nobody disturbed."""
    return final_state(undisturbed)


@pytest.fixture
def straight_losses(undisturbed, events):
    return [event["loss"] for event in events(undisturbed.run.output, "train")]


def kill_one(process, recipe, rank, at):
    """Kill the worker `rank` once `at` steps are logged."""
    wait_for(lambda: logged(recipe) >= at and len(workers(process)) == 2, process)
    victim = workers(process)[rank]
    victim.kill()
    wait_for(lambda: not psutil.pid_exists(victim.pid), process)


def test_killed_again_and_again_the_job_ends_with_the_same_bits(tiny, start, straight, events, monkeypatch):
    """With torchrun's own store, which keeps what the dead processes wrote."""
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    recipe = tiny(run=RUN)
    process = start(recipe, max_restarts=3)
    for number, rank in enumerate((1, 0, 1)):
        kill_one(process, recipe, rank, at=3 + 4 * number)
    process.finish()
    assert len(events(recipe.run.output, "resume")) == 3
    assert [event["global_step"] for event in events(recipe.run.output, "train")] == list(range(1, 16))
    assert_same_state(straight, final_state(recipe))


def test_a_process_that_is_stopped_is_named_and_the_job_goes_on(tiny, start, straight):
    recipe = tiny(run={**RUN, "timeout_minutes": 0.1})
    process = start(recipe, max_restarts=1)
    wait_for(lambda: logged(recipe) >= 4 and len(workers(process)) == 2, process)
    victim = workers(process)[1]
    victim.send_signal(signal.SIGSTOP)
    _, err = process.finish()
    assert f"rank 1 (process {victim.pid} on host " in err
    assert "has sent no heartbeat for 6 seconds" in err
    assert_same_state(straight, final_state(recipe))


def hang_once():
    """Have rank 1 hang in its tenth step, unless it does so already for the second time."""
    import os

    from fastdeit.training.step import TrainingStep

    if os.environ["RANK"] != "1" or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        return
    call = TrainingStep.__call__

    def hang_in_user_code(self, batch, epoch, step, global_step, check=None):
        if global_step == 9:
            time.sleep(10**6)
        return call(self, batch, epoch, step, global_step, check)

    TrainingStep.__call__ = hang_in_user_code


def test_a_process_that_hangs_is_named_with_its_stack_and_the_job_goes_on(tiny, start, events):
    recipe = tiny(run={**RUN, "timeout_minutes": 0.2})
    _, err = start(recipe, max_restarts=1, before=hang_once).finish()
    assert "rank 1 (process " in err
    assert "has kept the others waiting for 0.2 minutes" in err
    assert "in hang_in_user_code" in err
    (resume,) = events(recipe.run.output, "resume")
    assert resume["global_step"] == 9
    assert [event["global_step"] for event in events(recipe.run.output, "train")] == list(range(1, 16))


def test_if_torchrun_is_killed_its_processes_end_too(tiny, start, straight):
    recipe = tiny(run=RUN)
    process = start(recipe, max_restarts=1)
    wait_for(lambda: logged(recipe) >= 4 and len(workers(process)) == 2, process)
    orphans = workers(process)
    process.kill()
    assert psutil.wait_procs(orphans, timeout=60)[1] == []
    _, err = process.communicate(timeout=60)
    for rank, orphan in enumerate(orphans):
        assert f"torchrun (process {process.pid}), which started rank {rank} (process {orphan.pid}), has ended" in err
    start(recipe).finish()
    assert_same_state(straight, final_state(recipe))


def test_resumed_on_other_numbers_of_processes_the_losses_stay_the_same(tiny, start, straight_losses, events):
    recipe = tiny(run=RUN)
    for processes, at in ((1, 3), (2, 8), (4, None)):
        process = start(recipe, nproc_per_node=processes)
        if at is None:
            process.finish()
        else:
            wait_for(lambda at=at: logged(recipe) >= at, process)
            kill_tree(process)
    assert [event["world"] for event in events(recipe.run.output, "start")] == [1, 2, 4]
    losses = [event["loss"] for event in events(recipe.run.output, "train")]
    assert losses == pytest.approx(straight_losses, rel=1e-5)
