"""Stop a run whose loss or weights are no longer finite, and leave the evidence."""

import math

import torch

from fastdeit import checkpoint
from fastdeit.data import TrainBatch
from fastdeit.pipelines.errors import UserError
from fastdeit.training.logs import RunLog
from fastdeit.training.state import RunState
from fastdeit.training.step import TrainingStep


class NonFiniteLoss(UserError):
    """The loss became infinite or NaN; the message names the step and the file that holds the batch."""


def check_loss(
    loss: float, batch: TrainBatch, step: int, *, updated: bool, state: RunState, training: TrainingStep, log: RunLog
) -> None:
    """Stop the run if the loss of `step` is not finite, and save the batch and the weights that gave it.

    If the weights were `updated` since, the path of the last checkpoint is saved in their place.
    """
    if math.isfinite(loss):
        return
    rank, recipe = training.world.rank, training.recipe
    path = state.folder / f"nonfinite-rank{rank}.pt"
    last = next(iter(checkpoint.found(state.checkpoints)), None)
    indices = batch.data.index.tolist()
    reproduction = {
        "recipe": recipe.to_dict(),
        "epoch": state.epoch,
        "step": step,
        "rank": rank,
        "loss": loss,
        "index": batch.data.index,
        "repeat": torch.from_numpy(batch.repeat.copy()),
        "images": batch.data.images,
        "targets": batch.data.targets(training.num_classes, recipe.augment.label_smoothing),
        "model": None if updated else training.model.state_dict(),
        "last_checkpoint": str(last) if last else None,
    }
    global_step = state.epoch * training.steps_per_epoch + step + 1
    left = f"the batch{'' if updated else ' and the weights'} are in {path}"
    try:
        checkpoint.save(path, reproduction)
        log.event(
            "nonfinite",
            loss=str(loss),
            reproduction=str(path),
            indices=indices,
            epoch=state.epoch,
            step=step,
            global_step=global_step,
        )
    except (UserError, OSError) as error:  # the loss matters more than a full disk
        left = f"the batch could not be saved ({error})"
    again = (
        "Resume it with --run.resume_changed True and" if last else "No checkpoint was written yet: start again with"
    )
    raise NonFiniteLoss(
        f"the loss is {loss} at epoch {state.epoch + 1}, step {step}, samples {indices[:8]}...; {left}. {again} a "
        f"lower --optim.lr, --optim.clip_grad 1, or --run.precision bf16 instead of fp16"
    )


def check_weights(state: RunState, training: TrainingStep) -> None:
    """Stop every process if the weights of one are not finite, so that no checkpoint holds such weights."""
    norms = torch.stack(torch._foreach_norm([p.detach() for p in training.model.parameters()]))
    bad = training.world.sum((~torch.isfinite(norms).all()).double())
    if bad:
        raise NonFiniteLoss(
            f"the weights are not finite after epoch {state.epoch + 1}, step {state.step}; no checkpoint was "
            f"written with them. Resume from the last one with --run.resume_changed True and a lower --optim.lr, or "
            f"with --optim.clip_grad 1"
        )
