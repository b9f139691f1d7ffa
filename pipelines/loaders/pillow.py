"""The torch loader: PIL decodes, so it works wherever fastdeit is installed."""

import numpy as np

from fastdeit.pipelines.loaders.base import Region, ThreadedLoader, read_with_pil


class TorchLoader(ThreadedLoader):
    """Decodes through PIL, bit-identical to the data sets of torchvision and timm."""

    name, pixels = "torch", "pillow"

    def decode_image(self, index: int, out: np.ndarray, region: Region | None = None) -> bool:
        read_with_pil(self.dataset, index, out)
        return True
