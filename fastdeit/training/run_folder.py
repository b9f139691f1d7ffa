"""The folder of a run, on its main process: its lock, the recipe, and the record of the run's starts."""

import json
from pathlib import Path

from fastdeit.config import Recipe
from fastdeit.pipelines.formats.files import atomic_write
from fastdeit.pipelines.machine import machine_error
from fastdeit.training import run_record
from fastdeit.training.run_lock import RunLock, take_folder

RECIPE = "recipe.json"


class RunFolder:
    """Holds the folder for this process until `close`.

    notes  sentences for the run's opening lines

    Raises UserError if another run holds the folder, or if it has a recipe or a log that no run wrote.
    """

    def __init__(self, recipe: Recipe, lock: RunLock | None = None) -> None:
        """`lock` is taken here unless the caller has taken it already."""
        self._recipe, self._path = recipe, Path(recipe.run.output)
        self._lock = lock or take_folder(self._path)
        self._files: dict[str, bytes] = {}  # as last written
        self.notes = list(self._lock.notes)

    def write_recipe(self) -> None:
        """Write `recipe.json`, which `fastdeit-train --config` reads. Raises MachineError if it cannot be written."""
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._write(RECIPE, (json.dumps(self._recipe.to_dict(), indent=2) + "\n").encode())
        except OSError as error:
            raise machine_error(error, f"{self._path / RECIPE}: cannot be written") from error

    def record_start(self, processes: dict[str, list[str]], checkpoint: Path | None) -> str:
        """Add a start to the run's record, and return the run's id. Raises what `run_record.record_start` raises."""
        run_id = run_record.record_start(self._path, processes, checkpoint)
        self._files[run_record.NAME] = (self._path / run_record.NAME).read_bytes()
        return run_id

    def mend(self) -> bool:
        """Create the folder again if somebody has removed it or the lock in it; returns whether that had happened.

        Raises UserError if another run has taken the folder since, and OSError if it cannot be created.
        """
        removed = self._lock.lost()
        if removed:
            lost, self._lock = self._lock, RunLock(self._path)
            lost.close()
        for name, data in self._files.items():  # each time: the disk may have been full at the last one
            if not (self._path / name).exists():
                self._write(name, data)
        return removed

    def close(self) -> None:
        """Release the folder for the next run."""
        self._lock.close()

    def _write(self, name: str, data: bytes) -> None:
        with atomic_write(self._path / name) as file:
            file.write(data)
        self._files[name] = data
