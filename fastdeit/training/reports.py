"""Lines that a run logs while it trains."""

from collections.abc import Sequence
from pathlib import Path

from fastdeit.training.evaluation import Scores, headline
from fastdeit.training.logs import RunLog
from fastdeit.training.meter import Window
from fastdeit.training.profiling import Profile
from fastdeit.training.progress import duration
from fastdeit.training.state import RunState


def report_resume(log: RunLog, state: RunState, path: Path, changed: list[str]) -> None:
    """Log that the run continues from the checkpoint `path`, and what changed since."""
    log.event("resume", path=str(path), changed=changed, **state.position())
    log.say(f"resumed from {path}: epoch {state.epoch + 1}, step {state.step}")
    for phrase in changed:
        log.say(f"changed on resuming: {phrase}")


def report_window(log: RunLog, window: Window, *, eta: float, lr: float, position: dict[str, int]) -> None:
    """Log the mean losses and the rate of a window; `eta` is in seconds, `position` its last step."""
    loss, base, distill = window.losses.tolist()
    log.event(
        "train",
        **position,
        lr=lr,
        loss=loss,
        loss_base=base,
        loss_distill=distill,
        images_per_second=round(window.images_per_second, 1),
        data_wait=round(window.data_wait, 4),
        eta_seconds=round(eta),
    )
    log.progress.show(
        {
            "loss": f"{loss:.3f}",
            "im/s": f"{window.images_per_second:.0f}",
            "wait": f"{100 * window.data_wait:.0f}%",
            "run left": duration(eta),
        }
    )


def report_images(
    log: RunLog,
    epoch: int,
    loader: str,
    counts: Sequence[int],
    fallbacks: list[int],
    replaced: list[tuple[int, int]],
) -> None:
    """Log the images of an epoch that `loader` left to PIL, and those that do not decode.

    counts               of both, over all processes
    fallbacks, replaced  dataset indices of this process, as in `TrainBatch`
    """
    if counts[0]:
        log.event("fallbacks", epoch=epoch, count=counts[0], images=fallbacks)
        log.say(f"{counts[0]} images were read by PIL, since {loader} refused them: {fallbacks[:8]}")
    if counts[1]:
        log.event("replaced", epoch=epoch, count=counts[1], images=replaced)
        some = ", ".join(f"{bad} by {used}" for bad, used in replaced[:8])
        log.say(f"{counts[1]} images do not decode and were replaced, with their labels: {some}")


def report_scores(log: RunLog, state: RunState, kind: str, scores: Scores) -> None:
    """Log the scores of one kind of weights after an epoch."""
    log.event("eval", epoch=state.epoch - 1, global_step=state.global_step, weights=kind, **scores)


def report_top1(log: RunLog, state: RunState, scores: dict[str, Scores], late_fusion: str | None) -> None:
    """Log the headline of each kind of weights, on one line."""
    shown = "  ".join(f"{kind} {headline(values, late_fusion):.2f}%" for kind, values in scores.items())
    log.say(f"epoch {state.epoch}: top-1 {shown}")


def report_profile(log: RunLog, state: RunState, profile: Profile) -> None:
    """Log the time of each part of the profiled steps."""
    groups = profile.groups()
    parts = {name: round(1e3 * seconds / profile.steps, 4) for name, seconds in groups.items()}
    log.event("profile", global_step=state.global_step, steps=profile.steps, milliseconds=parts)
    shown = ", ".join(f"{name} {100 * seconds / profile.wall:.0f}%" for name, seconds in groups.items())
    log.say(f"profile of {profile.steps} steps in {state.folder}/profile.md and profile.json.gz: {shown}")


def report_end(log: RunLog, state: RunState, seconds: float) -> None:
    """Log the end of a run, `seconds` after its start."""
    log.event("end", epoch=state.epoch, global_step=state.global_step, seconds=round(seconds, 3))
    log.say(f"done: {state.epoch} epochs in {duration(seconds)}; {state.folder}")
