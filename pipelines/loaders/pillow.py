"""The reference loader: PIL decodes. Needs nothing but what fastdeit needs."""

from __future__ import annotations

import numpy as np

from fastdeit.pipelines.loaders.base import Region, ThreadedLoader, read_with_pil


class TorchLoader(ThreadedLoader):
    """Decodes through PIL, pixel for pixel what torchvision's and timm's data sets read."""

    name, pixels = "torch", "pillow"

    def decode_image(self, index: int, out: np.ndarray, region: Region | None = None) -> bool:
        read_with_pil(self.dataset, index, out)
        return True
