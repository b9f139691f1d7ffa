"""Several splits of one data set as one source, such as train and val of Flowers-102."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastdeit.pipelines.sources.base import Source, SourceError


class Joined:
    """The samples of `parts`, one after another. Raises SourceError unless all have the same classes."""

    def __init__(self, parts: list[Source]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))
        self.class_names = parts[0].class_names
        for part in parts[1:]:
            if part.class_names != self.class_names:
                raise SourceError(
                    f"{part.name(0)}: the splits that are to be joined have different classes: "
                    f"give all of them one list with --class-names"
                )

    @property
    def in_memory(self) -> bool:
        return any(part.in_memory for part in self._parts)

    def __len__(self) -> int:
        return self._ends[-1]

    def describe(self) -> dict[str, Any]:
        described = [part.describe() for part in self._parts]
        counts: dict[str, int] = {}
        for each in described:
            for name, value in each.items():
                if type(value) is int:
                    counts[name] = counts.get(name, 0) + value
        return {**described[0], **counts, "parts": described}

    def inputs(self) -> list[Path]:
        return list(dict.fromkeys(path for part in self._parts for path in part.inputs()))

    def _place(self, index: int) -> tuple[Source, int]:
        part = bisect_right(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)

    def name(self, index: int) -> str:
        part, own = self._place(index)
        return part.name(own)

    def read(self, index: int) -> tuple[bytes | Image.Image | np.ndarray, int, str]:
        part, own = self._place(index)
        return part.read(own)
