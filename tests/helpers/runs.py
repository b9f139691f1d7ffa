"""Training runs in this process."""

from fastdeit import checkpoint
from fastdeit.distributed import world
from fastdeit.training.trainer import Trainer


def train(recipe):
    """The scores of a whole run."""
    with world(recipe.run.device) as joined:
        return Trainer(recipe, joined).run()


def newest(recipe):
    """The path of the run's last checkpoint."""
    return checkpoint.found(recipe.run.output / "checkpoints")[0]


def final_state(recipe):
    return checkpoint.load(newest(recipe))


def rewind(recipe, step):
    """Remove the run's checkpoints after `step`."""
    folder = recipe.run.output / "checkpoints"
    for path in checkpoint.found(folder):
        if path > checkpoint.step_path(folder, step):
            path.unlink()


def trained(recipe):
    """The state at the end of a whole run."""
    train(recipe)
    return final_state(recipe)
