"""Watches the losses of a run; when they diverge, stops the run or names the steps to leave out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fastdeit import checkpoint
from fastdeit.data import TrainBatch
from fastdeit.distributed import World
from fastdeit.pipelines.errors import UserError
from fastdeit.sections import RunConfig
from fastdeit.training.logs import RunLog
from fastdeit.training.state import RunState
from fastdeit.training.step import TrainingStep

MOST_REWINDS = 5  # attempts for one divergence; the last leaves out 32 steps
NEAR = 100  # steps after a divergence within which another one counts as the same
_MILDER = "a lower --optim.lr, --optim.clip_grad 1, or --run.precision bf16 instead of fp16"
_DECAY, _SETTLED = 0.98, 100  # of the band's mean and variance; losses before it judges one

Position = dict[str, int]  # of a step: its `epoch`, its `step`, and its `global_step`, counted from 1
Save = Callable[[float, TrainBatch, Position], str]


class DivergedError(UserError):
    """A loss or weights that are not finite, or a loss far above those before it.

    global_step  the step whose loss is bad, or after which the weights are bad; counted from 1, as in the log
    """

    def __init__(self, message: str, global_step: int) -> None:
        super().__init__(message)
        self.global_step = global_step


class LossBand:
    """Mean and variance of the recent losses of a process; a loss far above them is an outlier.

    width  in standard deviations; 0: nothing is an outlier
    """

    def __init__(self, width: float) -> None:
        self._width = width
        self._mean, self._variance, self._count = 0.0, 0.0, 0

    def outlier(self, loss: float) -> float | None:
        """Standard deviations of `loss` above the mean if it is an outlier, else None. The mean excludes outliers."""
        if not self._width:
            return None
        if self._count >= _SETTLED:
            above = (loss - self._mean) / max(math.sqrt(self._variance), 1e-12)
            if above > self._width:
                return above
        share = max(1 - _DECAY, 1 / (self._count + 1))
        step = loss - self._mean
        self._mean += share * step
        self._variance = (1 - share) * (self._variance + share * step * step)
        self._count += 1
        return None

    def state(self) -> list[float]:
        return [self._mean, self._variance, float(self._count)]

    def load(self, state: list[float]) -> None:
        self._mean, self._variance, self._count = state[0], state[1], int(state[2])


class DivergenceGuard:
    """Checks each loss of this process and the weights before each checkpoint.

    With `run.on_divergence` "stop", a bad loss raises DivergedError at once. With "rewind", the guard only remembers it
    until all processes know (`found`, then `raise_together`), because all must go back together.
    """

    def __init__(self, run: RunConfig, world: World) -> None:
        self._world, self._run = world, run
        self._band = LossBand(run.divergence_band)
        self._bad: DivergedError | None = None

    @property
    def found(self) -> bool:
        """Whether this process has found a bad loss and waits for the others."""
        return self._bad is not None

    def check(self, loss: float, batch: TrainBatch, position: Position, state: RunState, save: Save) -> None:
        """Check the `loss` of the step with this `batch`; if it is bad, `save` is called: see `save_evidence`."""
        if self._bad is not None:
            return
        above = self._band.outlier(loss) if math.isfinite(loss) else math.inf
        if above is None:
            return
        what = f"the loss is {loss:g}"
        if math.isfinite(loss):
            what += f", {above:.0f} standard deviations above those before it (run.divergence_band)"
        indices = batch.data.index.tolist()
        where = f"epoch {position['epoch'] + 1}, step {position['step']}, samples {indices[:8]}..."
        error = self._error(f"{what} at {where}; {save(loss, batch, position)}", position["global_step"], state)
        if self._run.on_divergence == "stop":
            raise error
        self._bad = error

    def check_weights(self, state: RunState, training: TrainingStep) -> None:
        """Raise DivergedError on every process if the weights of one are not finite, or if a loss was bad.

        No checkpoint therefore holds such weights. Call it on all processes.
        """
        if self._run.on_divergence == "rewind":
            self.raise_together()
        norms = torch.stack(torch._foreach_norm([p.detach() for p in training.model.parameters()]))
        bad = self._world.sum((~torch.isfinite(norms).all()).double())
        if bad:
            raise self._error(
                f"the weights are not finite after epoch {state.epoch + 1}, step {state.step}; no checkpoint was "
                f"written with them",
                state.global_step,
                state,
            )

    def raise_together(self) -> None:
        """Raise the earliest DivergedError of all processes on each of them, if there is one; call it on all."""
        mine = None if self._bad is None else (self._bad.global_step, str(self._bad))
        found = [each for each in self._world.gathered(mine) if each is not None]
        if found:
            step, message = min(found)
            raise DivergedError(message, step)

    def steps_to_skip(self, error: DivergedError, state: RunState) -> range:
        """The steps (global, from 1) that the run leaves out when it goes back after `error`.

        These are two steps, because the update before a bad loss may be at fault as well. If the run diverges again
        near there, their number doubles. Raises DivergedError after `MOST_REWINDS` attempts without success.
        """
        near = 0 < error.global_step <= state.diverged + NEAR and state.rewinds > 0
        state.rewinds, state.diverged = state.rewinds + 1 if near else 1, error.global_step
        if state.rewinds > MOST_REWINDS:
            vain = f"{error}. The run has gone back {MOST_REWINDS} times, in vain"
            raise DivergedError(f"{vain}. Resume it with --run.resume_changed True and {_MILDER}", error.global_step)
        return range(max(1, error.global_step + 1 - 2**state.rewinds), error.global_step + 1)

    def _error(self, message: str, global_step: int, state: RunState) -> DivergedError:
        if self._run.on_divergence == "rewind":
            return DivergedError(message, global_step)
        if checkpoint.found(state.checkpoints):
            again = "Resume from the last checkpoint with --run.resume_changed True and"
        elif self._world.main:
            again = "No checkpoint was written yet: start again with"
        else:  # the folder may be on another machine
            again = "Resume from the last checkpoint, if there is one, with --run.resume_changed True and"
        skip = "or with --run.on_divergence rewind, which leaves out the steps that led there"
        return DivergedError(f"{message}. {again} {_MILDER}; {skip}", global_step)

    def forget(self) -> None:
        """Begin anew, after going back."""
        self._bad = None

    def state(self) -> list[list[float]]:
        """The bands of all processes, for a checkpoint. Call it on all processes."""
        return self._world.gathered(self._band.state())

    def load(self, state: list[list[float]]) -> None:
        """Continue with the bands of `state`, which may come from a different number of processes."""
        rank = self._world.rank
        self._band.load(state[rank] if len(state) == self._world.size else state[0])


def save_evidence(
    loss: float,
    batch: TrainBatch,
    position: Position,
    *,
    updated: bool,
    state: RunState,
    training: TrainingStep,
    log: RunLog,
) -> str:
    """Save the batch of a bad loss, and say where it is; also the weights that gave it, unless `updated` since."""
    rank, recipe = training.world.rank, training.recipe
    path = state.folder / f"nonfinite-rank{rank}.pt"
    last = next(iter(checkpoint.found(state.checkpoints)), None)
    reproduction = {
        "recipe": recipe.to_dict(),
        **position,
        "rank": rank,
        "loss": loss,
        "index": batch.data.index,
        "repeat": torch.from_numpy(batch.repeat.copy()),
        "images": batch.data.images,
        "targets": batch.data.targets(training.num_classes, recipe.augment.label_smoothing),
        "model": None if updated else training.model.state_dict(),
        "last_checkpoint": str(last) if last else None,
    }
    try:
        checkpoint.save(path, reproduction)
    except (UserError, OSError) as error:  # the loss matters more than a full disk
        return f"the batch could not be saved ({error})"
    log.event("nonfinite", loss=str(loss), reproduction=str(path), indices=batch.data.index.tolist(), **position)
    return f"the batch {'is' if updated else 'and the weights are'} in {path}"
