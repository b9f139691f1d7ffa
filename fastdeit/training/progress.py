"""Progress of a run for people: a bar on a terminal; elsewhere a plain line every `SECONDS`."""

import time
from collections.abc import Callable

from tqdm import tqdm

SECONDS = 30.0  # between two plain lines


class Progress:
    """Shows the steps of an epoch.

    bar          whether to draw a bar if stderr is a terminal
    say          prints a plain line if there is no bar: every `SECONDS`, and at the end of each epoch
    global_batch samples per step

    It uses only losses that the host has already read, so it never waits for a GPU.
    """

    def __init__(self, say: Callable[[str], None], *, bar: bool, global_batch: int) -> None:
        self._say, self._wants_bar, self._global_batch = say, bar, global_batch
        self._bar: tqdm | None = None
        self._losses, self._steps, self._done = list[float](), 0, 0
        self._since = 0.0

    def start_epoch(self, epoch: int, epochs: int, steps: int, first_step: int) -> None:
        self._epoch, self._epochs, self._steps_of_epoch, self._done = epoch, epochs, steps, first_step
        self._losses, self._steps, self._since = [], 0, time.monotonic()
        self._bar = None
        if self._wants_bar:
            self._bar = tqdm(
                total=steps,
                initial=first_step,
                desc=f"epoch {epoch + 1}/{epochs}",
                unit="step",
                dynamic_ncols=True,
                leave=False,
                disable=None,  # no bar into a file or a pipe
            )

    def loss(self, loss: float) -> None:
        """Add the loss of a step, which the host has read."""
        self._losses.append(loss)

    def advance(self) -> None:
        """Count one step."""
        self._done, self._steps = self._done + 1, self._steps + 1
        if (bar := self._drawn()) is not None:
            bar.update()
        elif time.monotonic() - self._since >= SECONDS:
            self._line()

    def show(self, shown: dict[str, str]) -> None:
        """Show these figures behind the bar when it next moves."""
        if (bar := self._drawn()) is not None:
            bar.set_postfix(shown, refresh=False)

    def end_epoch(self) -> None:
        if self._steps and self._drawn() is None:
            self._line()
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _drawn(self) -> tqdm | None:
        return None if self._bar is None or self._bar.disable else self._bar

    def _line(self) -> None:
        seconds = max(time.monotonic() - self._since, 1e-9)
        left = (self._epochs - self._epoch) * self._steps_of_epoch - self._done
        loss = f"loss {sum(self._losses) / len(self._losses):.4f}, " if self._losses else ""
        self._say(
            f"epoch {self._epoch + 1}/{self._epochs}, step {self._done}/{self._steps_of_epoch}: {loss}"
            f"{self._steps * self._global_batch / seconds:,.0f} im/s, "
            f"{duration(left * seconds / self._steps)} left"
        )
        self._losses, self._steps, self._since = [], 0, time.monotonic()


def duration(seconds: float) -> str:
    """`1d 02h`, `3h 04m`, `5m 06s`."""
    seconds = int(seconds)
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days}d {hours:02d}h"
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {seconds % 60:02d}s"
