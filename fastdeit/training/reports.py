"""Lines that a run logs while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdeit.training.logs import RunLog
from fastdeit.training.meter import Window
from fastdeit.training.progress import duration


def report_window(log: RunLog, window: Window, eta: float, at: dict[str, Any]) -> None:
    """Log the steps of a window; `at` says where it ends, `eta` is in seconds."""
    loss, base, distill = window.losses.tolist()
    log.event(
        "train",
        **at,
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
