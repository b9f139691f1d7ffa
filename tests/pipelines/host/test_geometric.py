"""Rotate, shear and translate against timm and PIL, to the level."""

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment

from fastdeit.pipelines.host.operations import apply_operations, operation_scratch
from fastdeit.pipelines.host.photometric import apply_table
from fastdeit.pipelines.plan.plan import BICUBIC, BILINEAR, CODE, rotation_matrices

TIMM = {
    "Rotate": auto_augment.rotate,
    "ShearX": auto_augment.shear_x,
    "ShearY": auto_augment.shear_y,
    "TranslateXRel": auto_augment.translate_x_rel,
    "TranslateYRel": auto_augment.translate_y_rel,
}
FILL = (124, 116, 104)


def ours(image: np.ndarray, name: str, arg: float, interp: int) -> np.ndarray:
    size = len(image)
    planes, table = image.transpose(2, 0, 1).flatten(), np.empty(768, np.uint8)
    op, args = np.array([CODE[name]], np.int8), np.array([arg], np.float64)
    matrix = rotation_matrices(op[None], args[None], size)[0]
    fill, scratch = np.array(FILL, np.uint8), operation_scratch(size)
    apply_operations(planes, table, op, args, matrix, np.array([interp], np.int8), fill, size, scratch)
    apply_table(planes, table)
    return planes.reshape(3, size, size).transpose(1, 2, 0)


def timms(image: np.ndarray, name: str, arg: float, interp: int) -> np.ndarray:
    out = TIMM[name](Image.fromarray(image), arg, resample=Image.Resampling(interp), fillcolor=FILL)
    return np.asarray(out)


@pytest.mark.slow
@pytest.mark.parametrize("interp", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("name", TIMM)
def test_every_operation_equals_timm_to_the_level(name, interp, make_image, draw_arg):
    rng = np.random.default_rng(CODE[name])
    for size in (1, 2, 5, 16, 31, 64, 64) * 8 + (224,) * 3:
        image, arg = make_image(rng, size, size), draw_arg(rng, name)
        arg *= 4 if rng.random() < 0.2 else 1  # further than the recipe goes
        np.testing.assert_array_equal(
            ours(image, name, arg, interp), timms(image, name, arg, interp), err_msg=f"{arg} {size}"
        )


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize("degrees", [0.0, 30.0, -30.0, 45.0, 90.0, -90.0, 180.0, 270.0, 360.0, 1e-9])
def test_rotations_that_pil_treats_apart(degrees, size):
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    np.testing.assert_array_equal(ours(image, "Rotate", degrees, BICUBIC), timms(image, "Rotate", degrees, BICUBIC))


@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateXRel", "TranslateYRel"])
@pytest.mark.parametrize("arg", [0.0, 0.25, -0.25, 0.5, 1.0, -1.0, 1.5, -1.5])
def test_shifts_by_whole_pixels_and_beyond_the_edge(name, arg):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for interp in (BILINEAR, BICUBIC):
        np.testing.assert_array_equal(ours(image, name, arg, interp), timms(image, name, arg, interp))


@pytest.mark.parametrize("name", TIMM)
def test_one_colour_stays_that_colour_where_it_is_not_filled(name, draw_arg):
    rng = np.random.default_rng(1)
    image = np.full((64, 64, 3), FILL, np.uint8)
    for _ in range(10):
        np.testing.assert_array_equal(ours(image, name, draw_arg(rng, name), BICUBIC), image)


def test_a_shift_within_rounding_of_a_whole_pixel_is_at_most_a_level_off():
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for pixels in (3.0, 17.0, -5.0):
        for nudge in (-1e-14, 1e-14, -3e-16):
            arg = pixels / 64 + nudge
            off = ours(image, "TranslateXRel", arg, BICUBIC).astype(int) - timms(image, "TranslateXRel", arg, BICUBIC)
            assert abs(off).max() <= 1
