"""Lines that a run logs while it trains."""

from collections.abc import Sequence
from typing import Any

from fastdeit.config import Recipe
from fastdeit.recipes import RECIPES
from fastdeit.recipes.curves import band, has_its_data, whose
from fastdeit.training.data_wait import Wait, event
from fastdeit.training.divergence import DivergedError
from fastdeit.training.evaluation import Scores, headline
from fastdeit.training.gpu_health import Gpu
from fastdeit.training.logs import RunLog
from fastdeit.training.meter import Window
from fastdeit.training.profiling import Profile
from fastdeit.training.progress import duration
from fastdeit.training.resume import Resumed
from fastdeit.training.startup import other_processes_sentence
from fastdeit.training.state import RunState

# Fields of a model that decide what it can learn.
_NETWORK = (
    "arch", "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "distilled", "layer_scale",
    "no_embed_class", "drop_rate", "drop_path",
)  # fmt: skip


def report_resume(log: RunLog, state: RunState, resumed: Resumed, recipe: Recipe, processes: int) -> None:
    """Log which checkpoint the run continues from, now on `processes` processes, and what has changed since."""
    log.event("resume", path=str(resumed.path), changed=resumed.changed, rounding=resumed.rounding, **state.position())
    ended = state.epoch == recipe.run.epochs
    where = "no step is left" if ended else f"epoch {state.epoch + 1}, step {state.step}"
    log.say(f"resumed from {resumed.path}: {where}")
    sentence = other_processes_sentence(recipe, resumed.processes, processes)
    if sentence is not None:
        log.say(sentence)
    for phrase in resumed.changed:
        log.say(f"changed on resuming: {phrase}")
    if resumed.rounding and not ended:
        log.warn(
            f"the checkpoint was written with {', '.join(resumed.rounding)}: the last bits of the weights may differ "
            f"from those of an uninterrupted run"
        )


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


def report_images(log: RunLog, epoch: int, loader: str, images: dict[str, list[Any]]) -> None:
    """Log the images of an epoch that `loader` left to PIL, and those that do not decode: see `EpochImages.state`."""
    fallbacks, replaced = images["fallbacks"], images["replaced"]
    if fallbacks:
        log.event("fallbacks", epoch=epoch, count=len(fallbacks), images=fallbacks)
        log.say(f"{len(fallbacks)} images were read by PIL, since {loader} refused them: {fallbacks[:8]}")
    if replaced:
        log.event("replaced", epoch=epoch, count=len(replaced), images=replaced)
        some = ", ".join(f"{bad} by {used}" for bad, used in replaced[:8])
        log.say(f"{len(replaced)} images do not decode and were replaced, with their labels: {some}")


def report_gpus(log: RunLog, epoch: int, gpus: Sequence[Gpu], warnings: Sequence[str]) -> None:
    """Log the GPUs of all processes after an epoch, if there are any, and `warnings` about them."""
    if gpus:
        log.event(
            "gpus",
            epoch=epoch,
            processes=[
                {
                    "memory_gib": round(gpu.memory / 2**30, 2),
                    "temperature": gpu.temperature,
                    "watts": None if gpu.watts is None else round(gpu.watts),
                    "joules": None if gpu.joules is None else round(gpu.joules),
                    "slowed": gpu.slowed,
                }
                for gpu in gpus
            ],
        )
    for warning in warnings:
        log.warn(warning)


def report_waits(log: RunLog, epoch: int, waits: list[Wait], warnings: Sequence[str]) -> None:
    """Log how long each process waited for data in an epoch, and `warnings` about it."""
    log.event("waits", epoch=epoch, processes=event(waits))
    for warning in warnings:
        log.warn(warning)


def report_scores(log: RunLog, state: RunState, kind: str, scores: Scores) -> None:
    """Log the scores of one kind of weights after an epoch."""
    log.event("eval", epoch=state.epoch - 1, global_step=state.global_step, weights=kind, **scores)


def report_top1(log: RunLog, state: RunState, scores: dict[str, Scores], late_fusion: str | None) -> None:
    """Log the headline of each kind of weights, on one line."""
    shown = "  ".join(f"{kind} {headline(values, late_fusion):.2f}%" for kind, values in scores.items())
    log.say(f"epoch {state.epoch}: top-1 {shown}")


def report_pace(log: RunLog, state: RunState, recipe: Recipe, training: int, classes: int, scores: Scores) -> None:
    """Warn if the top-1 of the weights is far below that of a known run of the recipe at the same epoch.

    training  images of an epoch
    """
    known = band(recipe.name, state.epoch)
    if known is None or recipe.name not in RECIPES:
        return
    named = RECIPES[recipe.name]().filled()
    sections = ("augment", "curriculum", "objective", "optim")
    same = all(getattr(recipe, each) == getattr(named, each) for each in sections)
    same &= all(getattr(recipe.model, each) == getattr(named.model, each) for each in _NETWORK)
    if not same or recipe.run.epochs != named.run.epochs:
        return
    if not has_its_data(recipe.name, training, recipe.run.global_batch, classes, scores["images"]):
        return
    expected, least = known
    top1 = scores["class"]["top1"]
    log.event("pace", epoch=state.epoch - 1, top1=top1, expected=round(expected, 2), least=round(least, 2))
    if top1 < least:
        log.warn(
            f"epoch {state.epoch}: top-1 {top1:.2f}% is below {least:.1f}%; {whose(recipe.name)} of {recipe.name} had "
            f"{expected:.1f}% there. Look for what differs (fastdeit report shows both curves) before training on"
        )


def report_best(log: RunLog, best: dict[str, Any] | None) -> None:
    """Log the best checkpoint so far, if there is a new one: see `note_best`."""
    if best is not None:
        log.event("best", **best)


def report_profile(log: RunLog, state: RunState, profile: Profile) -> None:
    """Log the time of each part of the profiled steps."""
    groups = profile.groups()
    parts = {name: round(1e3 * seconds / profile.steps, 4) for name, seconds in groups.items()}
    log.event("profile", global_step=state.global_step, steps=profile.steps, milliseconds=parts)
    shown = ", ".join(f"{name} {100 * seconds / profile.wall:.0f}%" for name, seconds in groups.items())
    log.say(f"profile of {profile.steps} steps in {state.folder}/profile.md and profile.json.gz: {shown}")


def report_rewind(log: RunLog, state: RunState, why: DivergedError, resumed: Resumed, skipped: range) -> None:
    """Log that the run has diverged, gone back to a checkpoint, and will leave out the steps `skipped`."""
    steps = list(skipped)
    log.event("rewind", path=str(resumed.path), diverged=why.global_step, skipped=steps, **state.position())
    log.warn(f"{why}. The run goes back to {resumed.path.name} and leaves out steps {steps[0]} to {steps[-1]}")


def report_end(log: RunLog, state: RunState, seconds: float, forecast: float | None) -> None:
    """Log the end of a run, `seconds` after its start; `forecast`: the seconds forecast for it."""
    if state.skipped:
        some = ", ".join(map(str, sorted(state.skipped)[:8]))
        more = ", ..." if len(state.skipped) > 8 else ""
        log.say(f"{len(state.skipped)} steps were left out after a divergence: {some}{more}")
    log.event("end", epoch=state.epoch, global_step=state.global_step, seconds=round(seconds, 3))
    beside = "" if forecast is None else f", {seconds / forecast:.2f} times the forecast"
    log.say(f"done: {state.epoch} epochs in {duration(seconds)}{beside}; {state.folder}")
