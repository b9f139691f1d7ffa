"""Two gloo processes against one, through torchrun, its workers forked or not, and the command line."""

import pytest
import torch

from fastdeit.recipes import convnet_teacher
from runs import evaluated, final_state, newest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("mode", "micro_batch"), [("mask", 0), ("mask", 8), ("skip", 8)])
def test_two_processes_equal_one(tiny, launch, events, taught, tmp_path, mode, micro_batch):
    """Loss per step within 1e-5 relative, with augmentation, distillation, stochastic depth and dropout on."""
    options = {**taught, "model": {"drop_path": 0.2, "drop_path_mode": mode, "drop_rate": 0.1}}
    losses, scores, weights = [], [], []
    for processes in (1, 2):
        recipe = tiny(**options, run={"output": tmp_path / f"p{processes}", "micro_batch": micro_batch})
        launch(recipe, processes)
        lines = events(recipe.run.output, "train")
        assert events(recipe.run.output, "start")[0]["world"] == processes
        losses.append([e["loss"] for e in lines])
        scores.append(events(recipe.run.output, "eval")[-1])
        weights.append(final_state(recipe)["model"])
    assert len(losses[0]) == 10
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert scores[0]["images"] == scores[1]["images"] == 44
    assert scores[0]["class"]["loss"] == pytest.approx(scores[1]["class"]["loss"], rel=1e-4)
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)


def test_a_convnet_is_scored_with_the_statistics_it_is_saved_with(tiny, launch, events, data):
    """Running means differ by process; the logged scores must be those of the checkpoint."""
    recipe = tiny(convnet_teacher, run={"epochs": 1})
    launch(recipe, 2)
    logged = events(recipe.run.output, "eval")[-1]
    found = evaluated(newest(recipe), data / "val.beton", loader="torch", device="cpu", threads=1)["model"]
    assert logged["images"] == found["images"] == 44
    assert logged["class"]["loss"] == pytest.approx(found["class"]["loss"], rel=1e-5)


def test_command_line_mistake_has_no_traceback(tiny, launch, tmp_path):
    process = launch(tiny(data={"train": tmp_path / "none.beton"}), status=2)
    assert "Traceback" not in process.err
    assert "none.beton" in process.err
