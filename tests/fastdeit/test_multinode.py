"""Two machines, each a network namespace with an address and a host name of its own, joined by a virtual cable."""

import pytest

from elastic import finish, kill_tree, logged, missing, starter, two_machines, wait_for, workers
from runs import assert_same_state, final_state

WHY_NOT = missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

RUN = {"epochs": 3, "eval_every": 3, "checkpoint_every": 1, "keep_checkpoints": 1}


@pytest.fixture(scope="module")
def machines():
    pair = two_machines()
    yield pair
    for machine in pair:
        machine.remove()


@pytest.fixture
def start(machines):
    """Function: start torchrun on a recipe on machine 0 or 1."""
    with starter() as starting:

        def run(recipe, number, **options):
            one = {
                "min_nodes": 2, "max_nodes": 2, "run_id": "job", "rdzv_endpoint": f"{machines[0].address}:29400",
                "rdzv_configs": {"is_host": number == 0}, "local_addr": machines[number].address,
                "machine": machines[number], **options,
            }  # fmt: skip
            return starting(recipe, **one)

        yield run


def test_two_machines_equal_one_process(tiny, start, launch, events, tmp_path):
    alone = tiny(run={**RUN, "output": tmp_path / "alone"})
    assert launch(alone).returncode == 0
    recipe = tiny(run=RUN)
    for process in [start(recipe, number) for number in (0, 1)]:
        finish(process)
    assert events(recipe.run.output, "start")[0]["world"] == 2
    losses = [[event["loss"] for event in events(each.run.output, "train")] for each in (alone, recipe)]
    assert len(losses[0]) == 15
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_machine_that_is_lost_and_returns(tiny, start, tmp_path, monkeypatch):
    # With a store of its own, torchrun does not tell the address of the first machine to one that comes later.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    straight = tiny(run={**RUN, "output": tmp_path / "straight"})
    for process in [start(straight, number) for number in (0, 1)]:
        finish(process)
    recipe = tiny(run=RUN)
    first, second = (start(recipe, number, max_restarts=3) for number in (0, 1))
    wait_for(lambda: logged(recipe) >= 4 and workers(second), first)
    kill_tree(second)
    again = start(recipe, 1, max_restarts=3)
    finish(first)
    finish(again)
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


def test_a_machine_that_falls_off_the_network_is_named_and_the_other_goes_on_alone(
    tiny, start, machines, events, monkeypatch
):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    recipe = tiny(run={**RUN, "timeout_minutes": 0.1})
    elastic = {"min_nodes": 1, "max_restarts": 3}
    first, second = (start(recipe, number, **elastic) for number in (0, 1))
    wait_for(lambda: logged(recipe) >= 4 and workers(second), first)
    lost = workers(second)[0].pid
    machines[1].cut()
    try:
        err = finish(first)
    finally:
        machines[1].mend()
    assert f"rank 1 (process {lost} on host beta) has given no sign of life for 6 seconds" in err
    assert [event["world"] for event in events(recipe.run.output, "start")] == [2, 1]
    assert [event["global_step"] for event in events(recipe.run.output, "train")] == list(range(1, 16))
