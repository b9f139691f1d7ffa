"""Where a run stands."""

from dataclasses import dataclass, field
from pathlib import Path

START = (0, 0, 0)


@dataclass
class RunState:
    """The next step of a run, and the run's folder.

    epoch, step   counted from 0; `step` is within the epoch
    global_step   steps done since the start
    counted_from  epoch, step and global step since which epochs have had their present number of steps
    skipped       numbers of the steps left out after a divergence, counted from 1 since the start
    diverged      number of the step that diverged last, counted likewise; 0: none has
    rewinds       how often the run has gone back because of that divergence
    """

    folder: Path
    epoch: int = 0
    step: int = 0
    global_step: int = 0
    counted_from: list[int] = field(default_factory=lambda: list(START))
    skipped: set[int] = field(default_factory=set[int])
    diverged: int = 0
    rewinds: int = 0

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    def position(self) -> dict[str, int]:
        """Epoch, step and global step, as the log names them."""
        return {"epoch": self.epoch, "step": self.step, "global_step": self.global_step}
