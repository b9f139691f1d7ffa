"""Operations on levels against timm and PIL, to the level."""

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment

from fastdeit.pipelines.host.operations import apply_operations, operation_scratch
from fastdeit.pipelines.host.photometric import apply_table
from fastdeit.pipelines.plan.plan import BICUBIC, CODE, rotation_matrices

TIMM = {
    "AutoContrast": auto_augment.auto_contrast,
    "Equalize": auto_augment.equalize,
    "Invert": auto_augment.invert,
    "Posterize": auto_augment.posterize,
    "Solarize": auto_augment.solarize,
    "SolarizeAdd": auto_augment.solarize_add,
    "Color": auto_augment.color,
    "Contrast": auto_augment.contrast,
    "Brightness": auto_augment.brightness,
    "Sharpness": auto_augment.sharpness,
    "GaussianBlur": auto_augment.gaussian_blur,
}
FILL = np.array([124, 116, 104], np.uint8)


def ours(image: np.ndarray, steps: list[tuple[str, float]]) -> np.ndarray:
    size = len(image)
    planes, table = image.transpose(2, 0, 1).flatten(), np.empty(768, np.uint8)
    op = np.array([CODE[name] for name, _ in steps], np.int8)
    arg = np.array([arg for _, arg in steps], np.float64)
    matrix, interp = rotation_matrices(op[None], arg[None], size)[0], np.full(len(steps), BICUBIC, np.int8)
    apply_operations(planes, table, op, arg, matrix, interp, FILL, size, operation_scratch(size))
    apply_table(planes, table)
    return planes.reshape(3, size, size).transpose(1, 2, 0)


def timms(image: np.ndarray, steps: list[tuple[str, float]]) -> np.ndarray:
    out = Image.fromarray(image)
    for name, arg in steps:
        if name in ("AutoContrast", "Equalize", "Invert"):
            out = TIMM[name](out)
        elif name == "Posterize" and arg == 0:
            out = Image.new("RGB", out.size)
        else:
            out = TIMM[name](out, int(arg) if name in ("Posterize", "Solarize", "SolarizeAdd") else arg)
    return np.asarray(out)


@pytest.mark.parametrize("name", TIMM)
def test_every_operation_equals_timm_to_the_level(name, make_image, draw_arg):
    rng = np.random.default_rng(CODE[name])
    for size in (1, 2, 3, 15, 32, 47, 64) * 8 + (224,):
        image, arg = make_image(rng, size, size), draw_arg(rng, name)
        np.testing.assert_array_equal(ours(image, [(name, arg)]), timms(image, [(name, arg)]), err_msg=f"{arg} {size}")


def test_composed_tables_equal_timm_to_the_level(make_image, draw_arg):
    rng = np.random.default_rng(0)
    for _ in range(300):
        steps = [(name, draw_arg(rng, name)) for name in rng.choice(list(TIMM), 3)]
        image = make_image(rng, 40, 40)
        np.testing.assert_array_equal(ours(image, steps), timms(image, steps), err_msg=str(steps))


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.5, 1.0, 1.9, 3.0])
@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
def test_enhancements_at_the_ends_of_their_range(name, factor):
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(ours(image, [(name, factor)]), timms(image, [(name, factor)]))


@pytest.mark.parametrize("bits", range(9))
def test_posterize_keeps_from_no_bits_to_all(bits):
    image = np.random.default_rng(2).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(ours(image, [("Posterize", bits)]), timms(image, [("Posterize", bits)]))
    if bits == 0:
        assert not ours(image, [("Posterize", bits)]).any()


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.5, 1.0, 2.0, 7.0, 40.0])
def test_blur_equals_pil_at_any_radius(sigma):
    image = np.random.default_rng(3).integers(0, 256, (33, 33, 3), dtype=np.uint8)
    np.testing.assert_array_equal(ours(image, [("GaussianBlur", sigma)]), timms(image, [("GaussianBlur", sigma)]))
