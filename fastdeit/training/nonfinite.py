"""What happens where a loss or the weights are no longer finite: the run stops, and leaves what explains it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fastdeit import checkpoint
from fastdeit.data import TrainBatch
from fastdeit.pipelines.errors import UserError

if TYPE_CHECKING:
    from fastdeit.training.trainer import Trainer


class NonFiniteLoss(UserError):
    """The loss became infinite or NaN; the message says at which step and where the batch was saved."""


def check_loss(trainer: Trainer, loss: float, batch: TrainBatch, step: int, *, updated: bool) -> None:
    """Stop the run where the loss of a step is not finite, and leave what is needed to look into it.

    That is the batch, and the weights that gave the loss; where they were `updated` since, the last checkpoint's
    path stands in for them.
    """
    if math.isfinite(loss):
        return
    path = trainer.folder / f"nonfinite-rank{trainer.world.rank}.pt"
    last = next(iter(checkpoint.found(trainer.folder / "checkpoints")), None)
    indices = batch.data.index.tolist()
    reproduction = {
        "recipe": trainer.recipe.to_dict(),
        "epoch": trainer.epoch,
        "step": step,
        "rank": trainer.world.rank,
        "loss": loss,
        "index": batch.data.index,
        "repeat": torch.from_numpy(batch.repeat.copy()),
        "images": batch.data.images,
        "targets": batch.data.targets(trainer.num_classes, trainer.recipe.augment.label_smoothing),
        "model": None if updated else trainer.model.state_dict(),
        "last_checkpoint": str(last) if last else None,
    }
    at = {"epoch": trainer.epoch, "step": step, "global_step": trainer.epoch * trainer.data.steps + step + 1}
    left = f"the batch{'' if updated else ' and the weights'} are in {path}"
    try:
        checkpoint.save(path, reproduction)
        trainer.log.event("nonfinite", loss=str(loss), reproduction=str(path), indices=indices, **at)
    except (UserError, OSError) as error:  # the loss matters more than a full disk
        left = f"the batch could not be saved ({error})"
    again = (
        "Resume it with --run.resume_changed True and" if last else "No checkpoint was written yet: start again with"
    )
    raise NonFiniteLoss(
        f"the loss is {loss} at epoch {trainer.epoch + 1}, step {step}, samples {indices[:8]}...; {left}. {again} a "
        f"lower --optim.lr, --optim.clip_grad 1, or --run.precision bf16 instead of fp16"
    )


def check_weights(trainer: Trainer) -> None:
    """Stop every process where the weights of one are not finite, so that no checkpoint holds such weights."""
    norms = torch.stack(torch._foreach_norm([p.detach() for p in trainer.model.parameters()]))
    bad = trainer.world.sum((~torch.isfinite(norms).all()).double())
    if bad:
        raise NonFiniteLoss(
            f"the weights are not finite after epoch {trainer.epoch + 1}, step {trainer.step}; no checkpoint was "
            f"written of them. Resume from the last one with --run.resume_changed True and a lower --optim.lr, or with "
            f"--optim.clip_grad 1"
        )
