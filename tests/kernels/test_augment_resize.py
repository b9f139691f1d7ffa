"""Crop, resize and flip against Pillow, to the bit."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastdeit.kernels.augment_resize import PLACE, START, crop_resize

pytestmark = pytest.mark.usefixtures("poisoned")


def by_pillow(image, crop, window, size, vertical_first, flip):
    """One pass at a time, so that every version of Pillow takes them in this order."""
    top, left, height, width = crop
    out_height, out_width, from_row, from_column = window
    part = Image.fromarray(np.ascontiguousarray(image[top : top + height, left : left + width]))
    first = (width, out_height) if vertical_first else (out_width, height)
    out = part.resize(first, Image.Resampling.BICUBIC).resize((out_width, out_height), Image.Resampling.BICUBIC)
    out = np.asarray(out)[from_row : from_row + size, from_column : from_column + size]
    return out[:, ::-1] if flip else out


def ours(device, images, cases, size):
    """(cases, S, S, 3). A case is the number of an image, crop, window, whether the vertical pass is first, flip."""
    gap = 5  # bytes between images: nothing is aligned
    pixels = np.concatenate([np.r_[image.reshape(-1), np.full(gap, 255, np.uint8)] for image in images])
    offsets = np.cumsum([0] + [image.size + gap for image in images])
    place, start = np.zeros((len(cases), PLACE), np.int32), np.zeros((len(cases), START), np.int64)
    taps, between = 0, 0
    for row, (number, crop, window, vertical_first, flip) in enumerate(cases):
        top, left, height, width = crop
        pitch = images[number].shape[1] * 3
        # Of the axis of the second pass all is asked for, which is always enough.
        place[row, :11] = [height, width, *window, 0, width if vertical_first else height, vertical_first, flip, pitch]
        room = 8 * max(height, width) + 9
        start[row] = offsets[number] + top * pitch + 3 * left, between, taps, taps + size * room
        taps += 2 * size * room
        between += -(-3 * size * max(height, width) // 16) * 16
    planes = torch.empty((len(cases), 2, 3, size, size), dtype=torch.uint8, device=device)
    crop_resize(
        torch.from_numpy(pixels).to(device),
        torch.from_numpy(place).to(device),
        torch.from_numpy(start).to(device),
        torch.empty(taps, dtype=torch.int32, device=device),
        torch.empty((len(cases), 2, 2, size), dtype=torch.int32, device=device),
        torch.empty(between, dtype=torch.uint8, device=device),
        planes[:, 0],
    )
    return planes[:, 0].permute(0, 2, 3, 1).cpu().numpy()


def compare(device, images, cases, size):
    made = ours(device, images, cases, size)
    for out, (number, crop, window, vertical_first, flip) in zip(made, cases, strict=True):
        expected = by_pillow(images[number], crop, window, size, vertical_first, flip)
        np.testing.assert_array_equal(out, expected, err_msg=f"{crop} {window} {vertical_first} {flip}")


def draw_cases(rng, images, count, size):
    for _ in range(count):
        number = int(rng.integers(len(images)))
        rows, columns, _ = images[number].shape
        height, width = int(rng.integers(1, rows + 1)), int(rng.integers(1, columns + 1))
        top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
        yield number, (top, left, height, width), (size, size, 0, 0), bool(rng.integers(2)), bool(rng.integers(2))


def noise(rng, *sizes):
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.mark.slow
@pytest.mark.parametrize("size", [7, 16])
def test_random_crops(device, size):
    rng = np.random.default_rng(size)
    images = noise(rng, (31, 40), (1, 1), (45, 3), (2, 30), (size, size))
    compare(device, images, list(draw_cases(rng, images, 12, size)), size)


@pytest.mark.slow
def test_crops_of_one_pixel_of_the_output_size_and_at_every_edge(device):
    rng = np.random.default_rng(1)
    images = noise(rng, (20, 23))
    crops = [(0, 0, 1, 1), (19, 22, 1, 1), (0, 0, 20, 23), (2, 3, 8, 8), (0, 22, 20, 1), (19, 0, 1, 23), (5, 0, 8, 23)]
    compare(device, images, [(0, crop, (8, 8, 0, 0), first, True) for crop in crops for first in (False, True)], 8)


@pytest.mark.slow
def test_a_window_of_a_larger_result(device):
    rng = np.random.default_rng(2)
    images = noise(rng, (20, 31))
    windows = [(10, 15, 1, 3), (8, 12, 0, 4), (20, 31, 6, 11), (33, 40, 25, 0)]
    cases = [(0, (0, 0, 20, 31), window, first, False) for window in windows for first in (False, True)]
    compare(device, images, cases, 8)


@pytest.mark.slow
def test_a_tile_does_not_stop_at_the_first(device):
    """Outputs and crops larger than a tile of any kind."""
    rng = np.random.default_rng(3)
    images = noise(rng, (90, 60), (50, 95))
    cases = [(i, (0, 0, *images[i].shape[:2]), (47, 47, 0, 0), first, True) for i in (0, 1) for first in (False, True)]
    compare(device, images, cases, 47)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [224, 384])
def test_random_crops_at_full_size(device, size):
    rng = np.random.default_rng(size)
    images = noise(rng, (375, 500), (500, 333), (1200, 1600), (64, 3000), (3000, 50))
    compare(device, images, list(draw_cases(rng, images, 96, size)), size)
