"""Turns the log's warnings, faults and interruptions into sentences."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

STALL = 1.0  # seconds; shorter waits for a checkpoint are not listed
WAIT_SHARE, WAIT_SECONDS = (
    0.2,
    10.0,
)  # shorter waits in an epoch are not listed; as in `training/data_wait.py`
_MOST = 2000  # characters of a sentence
_FEW = 8  # images that a sentence names


@dataclass(frozen=True)
class Incident:
    """An event: its time (seconds since 1970), where the run was, the kind of the event, and what happened."""

    time: float
    place: str
    kind: str
    text: str


def incident(event: dict[str, Any], time: float, last_step: int) -> Incident | None:
    """The event as an incident, or None if it is not one. `last_step` is the last training step before it.

    Raises KeyError, TypeError, ValueError or AttributeError if a field of the event is missing or wrong.
    """
    describe = _SENTENCES.get(event["event"])
    text = None if describe is None else describe(event)
    if text is None:
        return None
    if "global_step" in event:
        place = f"step {int(event['global_step'])}"
    elif "epoch" in event:
        place = f"epoch {int(event['epoch']) + 1}"
    else:
        place = f"after step {last_step}" if last_step else "start"
    return Incident(time, place, event["event"], text if len(text) <= _MOST else f"{text[:_MOST]} ...")


def _replaced(event: dict[str, Any]) -> str:
    some = [f"{int(bad)} by {int(used)}" for bad, used in event["images"][:_FEW]]
    return f"replaced {_count(event)} that could not be decoded: {_listed(some, event)}"


def _fallbacks(event: dict[str, Any]) -> str:
    some = [str(int(index)) for index in event["images"][:_FEW]]
    return f"PIL read {_count(event)} that the loader's decoder refused: {_listed(some, event)}"


def _count(event: dict[str, Any]) -> str:
    count = int(event["count"])
    return "1 image" if count == 1 else f"{count} images"


def _listed(some: list[str], event: dict[str, Any]) -> str:
    return ", ".join(some) + (", ..." if len(event["images"]) > len(some) else "")


def _nonfinite(event: dict[str, Any]) -> str:
    return f"loss {event['loss']}; the batch is stored in {event['reproduction']}"


def _rewind(event: dict[str, Any]) -> str:
    skipped = [int(step) for step in event["skipped"]]
    left_out = f"; skipped steps {skipped[0]} to {skipped[-1]}" if skipped else ""
    return f"diverged at step {int(event['diverged'])}; went back to {PurePath(event['path']).name}{left_out}"


def _resume(event: dict[str, Any]) -> str:
    changed = "".join(f"; changed: {phrase}" for phrase in event["changed"])
    return f"continued from {PurePath(event['path']).name}{changed}"


def _checkpoint(event: dict[str, Any]) -> str | None:
    stall = float(event.get("stall_seconds", 0.0))
    if stall < STALL:
        return None
    name = PurePath(event["path"]).name
    return f"training waited {stall:.1f} s for {name}, which took {event['seconds']:.1f} s to write"


def _waits(event: dict[str, Any]) -> str | None:
    long = [
        f"process {rank} ({wait['host']}) waited {wait['seconds']:.0f} s for data, "
        f"{100 * wait['share']:.0f}% of the epoch"
        for rank, wait in enumerate(event["processes"])
        if wait["share"] >= WAIT_SHARE and wait["seconds"] >= WAIT_SECONDS
    ]
    return "; ".join(long) or None


_SENTENCES: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "warning": lambda event: str(event["text"]),
    "replaced": _replaced,
    "fallbacks": _fallbacks,
    "nonfinite": _nonfinite,
    "rewind": _rewind,
    "stopped": lambda event: f"by {event['signal']}",
    "resume": _resume,
    "checkpoint": _checkpoint,
    "waits": _waits,
}
