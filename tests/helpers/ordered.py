"""A loader and the order whose steps it decodes, as `fastdeit.data.Pipeline` takes them one after another."""


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
