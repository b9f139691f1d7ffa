"""Two machines, each a network namespace with an address and a host name of its own, joined by a virtual cable."""

import pytest

from elastic import kill_tree, logged, missing, printed, starter, two_machines, workers
from runs import assert_same_state, final_state
from system import wait_for

WHY_NOT = missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

RUN = {"epochs": 3, "eval_every": 3, "checkpoint_every": 1, "keep_checkpoints": 1}


@pytest.fixture(scope="module")
def machines():
    pair = two_machines()
    yield pair
    for machine in pair:
        machine.remove()


@pytest.fixture(scope="module")
def starting(machines):
    """Function: start torchrun on a recipe on machine 0 or 1."""
    with starter() as start_on:

        def start(recipe, number, **options):
            defaults = {
                "min_nodes": 2, "max_nodes": 2, "run_id": recipe.run.output.parent.name,
                "rdzv_endpoint": f"{machines[0].address}:29400", "rdzv_configs": {"is_host": number == 0},
                "local_addr": machines[number].address, "machine": machines[number],
            }  # fmt: skip
            return start_on(recipe, **{**defaults, **options})

        yield start


@pytest.fixture
def start(starting, monkeypatch):
    """The same; a torchrun that comes later would not learn the address of torchrun's own store."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    return starting


@pytest.fixture(scope="module")
def straight(tiny_in, starting, tmp_path_factory):
    """The recipe of a run on two machines that has ended, with torchrun's own store."""
    recipe = tiny_in(tmp_path_factory.mktemp("straight") / "run", run=RUN)
    for process in [starting(recipe, number) for number in (0, 1)]:
        process.finish()
    return recipe


def test_two_machines_equal_one_process(tiny, straight, launch, events):
    alone = tiny(run=RUN)
    launch(alone)
    assert events(straight.run.output, "start")[0]["world"] == 2
    losses = [[event["loss"] for event in events(each.run.output, "train")] for each in (alone, straight)]
    assert len(losses[0]) == 15
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_machine_that_is_lost_and_returns(tiny, straight, start):
    recipe = tiny(run=RUN)
    first, second = (start(recipe, number, max_restarts=3) for number in (0, 1))
    wait_for(lambda: logged(recipe) >= 4 and workers(second), first)
    kill_tree(second)
    again = start(recipe, 1, max_restarts=3)
    first.finish()
    again.finish()
    assert_same_state(final_state(straight), final_state(recipe))


def test_a_machine_with_another_recipe_and_version_is_refused_by_name_on_both(tiny, start, tmp_path):
    recipe = tiny(run=RUN)
    other = tiny(run={**RUN, "seed": 1, "output": tmp_path / "other"})
    processes = [start(recipe, 0), start(other, 1, version="0.0.9")]
    for process in processes:
        _, err = process.communicate(timeout=240)
        assert process.returncode != 0
        assert "exitcode  : 2" in err
        assert "error: rank 1 (process " in err
        assert " on host beta) has fastdeit 0.0.9 instead of " in err
        assert (
            f"--run.seed 1 instead of 0, --run.output {other.run.output} instead of {recipe.run.output} on rank 0"
            in err
        )
        assert " on host alpha): give all machines the same command" in err
    assert not (recipe.run.output / "log.jsonl").exists()


def test_a_machine_that_falls_off_the_network_is_named_and_the_other_goes_on_alone(tiny, start, machines, events):
    recipe = tiny(run={**RUN, "timeout_minutes": 0.1})
    elastic = {"min_nodes": 1, "max_restarts": 3}
    first, second = (start(recipe, number, **elastic) for number in (0, 1))
    wait_for(lambda: logged(recipe) >= 4 and workers(second), first)
    lost = workers(second)[0].pid
    machines[1].cut()
    try:
        _, err = first.finish()
        # The machine that is cut off does not train on alone either.
        wait_for(lambda: f"rank 1 (process {lost} on host beta) cannot reach the run's store" in printed(second))
    finally:
        machines[1].mend()
    assert f"rank 1 (process {lost} on host beta) has sent no heartbeat for 6 seconds" in err
    assert [event["world"] for event in events(recipe.run.output, "start")] == [2, 1]
    assert [event["global_step"] for event in events(recipe.run.output, "train")] == list(range(1, 16))
