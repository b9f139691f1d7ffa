"""The host stage's resize against PIL, to the bit."""

import numpy as np
import PIL
import pytest
from PIL import Image

from fastdeit.pipelines.host.resize import resize, resize_scratch, vertical_first
from fastdeit.pipelines.plan import replay

PIL_ORDER = int(PIL.__version__.split(".")[0]) >= 13  # since then PIL may run the vertical pass first


def ours(image: np.ndarray, box: tuple[int, ...], size: int, flip: bool, interpolation: int) -> np.ndarray:
    """(size, size, 3); the memory behind the crop is poisoned with whatever the image holds there."""
    top, left, height, width = box
    planes = np.full(3 * size * size, 77, np.uint8)
    scratch = resize_scratch(size, max(height, width))
    offset, pitch = (top * image.shape[1] + left) * 3, image.shape[1] * 3
    resize(
        image.reshape(-1), offset, pitch, height, width, size, size, 0, 0, size, flip, interpolation, planes, scratch
    )
    return planes.reshape(3, size, size).transpose(1, 2, 0)


def pils(image: np.ndarray, box: tuple[int, ...], size: int, flip: bool, interpolation: int) -> np.ndarray:
    top, left, height, width = box
    crop = Image.fromarray(image).crop((left, top, left + width, top + height))
    if PIL_ORDER:
        out = crop.resize((size, size), Image.Resampling(interpolation))
    else:  # one pass at a time, in the order of newer versions
        between = (width, size) if vertical_first(height, width, size, size) else (size, height)
        out = crop.resize(between, Image.Resampling(interpolation)).resize(
            (size, size), Image.Resampling(interpolation)
        )
    return np.asarray(out.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else out)


@pytest.mark.parametrize("size", [1, 5, 16, 33, 64, 224])
def test_random_crops_equal_pil_to_the_bit(size, make_image):
    rng = np.random.default_rng(size)
    for trial in range(25 if size == 224 else 120):
        rows, columns = (int(n) for n in rng.integers(1, 400 if size == 224 else 200, 2))
        image = make_image(rng, rows, columns)
        height, width = int(rng.integers(1, rows + 1)), int(rng.integers(1, columns + 1))
        height = min(rows, size) if trial % 7 == 0 else height
        width = min(columns, size) if trial % 5 == 0 else width
        box = (int(rng.integers(0, rows - height + 1)), int(rng.integers(0, columns - width + 1)), height, width)
        flip, interpolation = bool(rng.integers(2)), int(rng.choice([2, 3]))
        np.testing.assert_array_equal(
            ours(image, box, size, flip, interpolation), pils(image, box, size, flip, interpolation)
        )


@pytest.mark.parametrize(
    ("rows", "columns", "size"),
    [(1, 1, 32), (1, 300, 32), (300, 1, 32), (17, 5, 32), (300, 6, 32), (32, 32, 32), (32, 90, 32), (90, 32, 32)],
)
def test_extreme_shapes_equal_pil_to_the_bit(rows, columns, size):
    image = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    for flip in (False, True):
        box = (0, 0, rows, columns)
        np.testing.assert_array_equal(ours(image, box, size, flip, 3), pils(image, box, size, flip, 3))


@pytest.mark.parametrize("level", [0, 255, 93])
def test_one_colour_stays_that_colour(level):
    image = np.full((70, 50, 3), level, np.uint8)
    assert (ours(image, (3, 4, 60, 40), 48, True, 3) == level).all()


def test_replay_resizes_as_this_version_of_pil_does_where_the_order_agrees():
    rng = np.random.default_rng(1)
    for rows, columns in ((40, 90), (90, 90), (20, 20), (200, 40)):
        image = Image.fromarray(rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8))
        if PIL_ORDER or not vertical_first(rows, columns, 32, 32):
            expected = image.resize((32, 32), Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(np.asarray(replay.resize(image, 32, 32)), np.asarray(expected))
