"""Every loader, opened on a data set and an order."""

import pytest

from fastdeit.pipelines.formats.beton_layout import JPEG
from fastdeit.pipelines.loaders.choose import LOADERS, open_loader
from fastdeit.pipelines.loaders.prefetch import make_pool
from fastdeit.pipelines.plan.order import EvalOrder
from ordered import Ordered, need_loader
from pictures import jpeg, picture


@pytest.fixture
def pool():
    with make_pool(3) as pool:
        yield pool


@pytest.fixture(params=LOADERS)
def opened(request, pool):
    """Opens the loader under test on a data set and an order; by default evaluation in batches of 8."""
    need_loader(request.param)

    def open_one(dataset, order=None, **options):
        order = order or EvalOrder(len(dataset), batch=8)
        return Ordered(open_loader(request.param, dataset, pool=pool, threads=3, **options), order)

    open_one.name = request.param
    return open_one


@pytest.fixture(scope="session")
def many_jpegs():
    """40 samples for `write`: JPEGs of different sizes."""
    sizes = [(33 + 7 * (i % 5), 40 + i) for i in range(40)]
    return [(jpeg(picture(i, size)), size, JPEG) for i, size in enumerate(sizes)]
