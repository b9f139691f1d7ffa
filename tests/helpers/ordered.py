"""A loader and the order whose steps it decodes, as `fastdeit.data.Pipeline` takes them one after another."""

import numpy as np
import pytest

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.loaders.choose import FAST


def need_loader(name):
    """Skip the test, or the module, where what the loader needs is not installed."""
    try:
        FAST.get(name, lambda: None)()
    except UserError as error:
        pytest.skip(str(error), allow_module_level=True)


def assert_images(batch, images):
    """The images of `batch`, slot by slot, are `images`."""
    for slot, image in enumerate(images):
        np.testing.assert_array_equal(batch.image(slot), image)


def first_batch(loader):
    """Of the first epoch; the loader is closed."""
    with loader:
        return next(loader.batches(0))


class Ordered:
    """Attributes are the loader's; a context manager that closes it.

    regions  function of a step's samples: what each needs of its image, (B, 4); None: all of it
    """

    def __init__(self, loader, order, regions=None):
        self.loader, self.order, self._regions = loader, order, regions

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.loader.close()

    def batches(self, epoch, first_step=0):
        """The batches of `epoch` from `first_step` on."""
        previous = None
        for step in range(first_step, self.order.steps):
            samples = self.order.step(epoch, step)
            following = self.order.step(epoch, step + 1) if step + 1 < self.order.steps else None
            regions = None if self._regions is None else self._regions(samples)
            previous = self.loader.decode(samples, regions, previous=previous, following=following)
            yield previous
