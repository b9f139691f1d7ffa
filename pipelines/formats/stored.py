"""What data sets of both formats do alike once their tables are read."""

from pathlib import Path
from typing import Any, Self

import numpy as np

from fastdeit.pipelines.closing import Closing
from fastdeit.pipelines.formats import sidecar
from fastdeit.pipelines.formats.beton_layout import JPEG
from fastdeit.pipelines.formats.checksums import Checksums


class StoredImages(Closing):
    """The base of both kinds of `Dataset`: its sidecar, and what it says of a sample. A subclass sets the fields."""

    path: Path
    label: np.ndarray
    _mode: np.ndarray  # (N,) JPEG or RAW

    def _read_sidecar(self, path: Path, kind: str, metadata_hash: str) -> None:
        """Read the sidecar at `path`, if there is one; raises SidecarError unless it belongs to this data set."""
        self.class_names: list[str] | None = None
        self.content_hash: str | None = None
        self.sidecar: dict[str, Any] | None = None
        self.checksums: Checksums | None = None
        self.num_classes = int(self.label.max()) + 1
        if not path.exists():
            return
        self.sidecar = sidecar.read(
            path, kind=kind, num_samples=len(self), num_classes=self.num_classes, metadata_hash=metadata_hash
        )
        self.class_names, self.content_hash = self.sidecar["class_names"], self.sidecar["content_hash"]
        self.checksums = Checksums(sidecar.crc32s(self.sidecar))
        self.num_classes = len(self.sidecar["class_names"])

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.path,)

    def __len__(self) -> int:
        return len(self.label)

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: there is no sample {index}, only 0 to {len(self) - 1}")

    def is_jpeg(self, index: int) -> bool:
        """Whether sample `index` is stored as a JPEG file; if not, as raw RGB (height, width, 3)."""
        self._check_index(index)
        return bool(self._mode[index] == JPEG)
