"""Samples that the tests of loaders share."""

import pytest

from fastdeit.pipelines.formats.beton_layout import JPEG
from pictures import jpeg, picture


@pytest.fixture(scope="session")
def many_jpegs():
    """40 samples for `write`: JPEGs of different sizes."""
    sizes = [(33 + 7 * (i % 5), 40 + i) for i in range(40)]
    return [(jpeg(picture(i, size)), size, JPEG) for i, size in enumerate(sizes)]
