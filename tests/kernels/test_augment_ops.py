"""Every operation on the device against timm and Pillow, to the level."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm

from fastdeit.kernels import augment_blur, augment_levels, augment_ops
from fastdeit.kernels import augment_levels as ops
from fastdeit.kernels.augment_ops import apply_operations

pytestmark = pytest.mark.usefixtures("poisoned")

FILL = (124, 116, 104)
_MOVING = {ops.COLOR, ops.SHARPNESS, ops.SHIFT_X, ops.SHIFT_Y, ops.AFFINE}


def make_images(rng, count, size):
    """Noise, few levels, one level, and something smooth."""
    images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    images[1::4] = images[1::4] % 8 * 20 + 40
    images[2::4] = images[2::4, :1, :1]
    for i in range(3, count, 4):
        small = Image.fromarray(images[i, : max(1, size // 5), : max(1, size // 5)])
        images[i] = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))
    return images


def ours(device, images, steps):
    """Samples through their steps, each (code, bicubic, numbers); as many steps for every sample."""
    count, size, layers = len(images), images.shape[1], len(steps[0])
    operation = np.zeros((layers, count, ops.OPERATION), np.int32)
    argument = np.zeros((layers, count, ops.ARGUMENT), np.float64)
    ending = []
    for sample, own in enumerate(steps):
        side, pending = 0, 0
        for layer, (code, cubic, numbers) in enumerate(own):
            operation[layer, sample] = code, cubic, side, pending
            argument[layer, sample, : len(numbers)] = numbers
            if code in _MOVING:
                side, pending = 1 - side, 0
            elif code == ops.BLUR:
                pending = 0
            elif code != ops.IDENTITY:
                pending = 1
        ending.append((side, pending))
    planes = torch.empty((count, 2, 3, size, size), dtype=torch.uint8, device=device)
    planes[:, 0] = torch.from_numpy(images).permute(0, 3, 1, 2).to(device)
    tables = torch.empty((layers + 1, count, 3, 256), dtype=torch.uint8, device=device)
    apply_operations(
        planes,
        torch.from_numpy(operation).to(device),
        torch.from_numpy(argument).to(device),
        tables,
        torch.tensor(FILL, dtype=torch.uint8, device=device),
        tuple((operation[:, :, 0] == ops.BLUR).any(1)),
    )
    out, tables = planes.cpu().numpy(), tables[layers].cpu().numpy()
    for sample, (side, pending) in enumerate(ending):
        image = out[sample, side]
        if pending:
            image = np.stack([tables[sample, c][image[c]] for c in range(3)])
        yield image.transpose(1, 2, 0)


def by_timm(image, code, cubic, numbers):
    number = numbers[0] if numbers else 0.0
    geometric = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR}
    if code == ops.POSTERIZE:
        return timm.posterize(image, int(number)) if number else Image.new("RGB", image.size)
    if code == ops.AFFINE:
        return image.transform(image.size, Image.Transform.AFFINE, numbers, geometric["resample"], fillcolor=FILL)
    if code in (ops.SHIFT_X, ops.SHIFT_Y):
        slope, offset = numbers
        sheared, moved = (
            (timm.shear_x, timm.translate_x_abs) if code == ops.SHIFT_X else (timm.shear_y, timm.translate_y_abs)
        )
        return sheared(image, slope, **geometric) if slope else moved(image, offset, **geometric)
    plain = {ops.AUTO_CONTRAST: timm.auto_contrast, ops.EQUALIZE: timm.equalize, ops.INVERT: timm.invert}
    whole = {ops.SOLARIZE: timm.solarize, ops.SOLARIZE_ADD: timm.solarize_add}
    if code == ops.IDENTITY:
        return image
    if code in plain:
        return plain[code](image)
    if code in whole:
        return whole[code](image, int(number))
    factor = {
        ops.COLOR: timm.color,
        ops.CONTRAST: timm.contrast,
        ops.BRIGHTNESS: timm.brightness,
        ops.SHARPNESS: timm.sharpness,
        ops.BLUR: timm.gaussian_blur,
    }
    return factor[code](image, number)


def compare(device, images, steps):
    for image, own, out in zip(images, steps, ours(device, images, steps), strict=True):
        expected = Image.fromarray(image)
        for step in own:
            expected = by_timm(expected, *step)
        np.testing.assert_array_equal(out, np.asarray(expected), err_msg=str(own))


# Numbers of every operation: more than the range of the recipe, its ends, and what changes nothing.
NUMBERS = {
    ops.IDENTITY: [()],
    ops.AUTO_CONTRAST: [()] * 4,
    ops.EQUALIZE: [()] * 4,
    ops.INVERT: [()],
    ops.POSTERIZE: [(0,), (1,), (4,), (7,), (8,)],
    ops.SOLARIZE: [(0,), (1,), (128,), (255,), (256,)],
    ops.SOLARIZE_ADD: [(0,), (1,), (110,), (128,)],
    ops.BRIGHTNESS: [(0.0,), (0.1,), (1.0,), (1.37,), (1.9,)],
    ops.CONTRAST: [(0.0,), (0.1,), (1.0,), (1.37,), (1.9,)],
    ops.COLOR: [(0.0,), (0.1,), (1.0,), (1.37,), (1.9,)],
    ops.SHARPNESS: [(0.0,), (0.1,), (1.0,), (1.37,), (1.9,)],
    ops.BLUR: [(0.0,), (0.1,), (0.8,), (2.0,), (3.0,)],
    ops.SHIFT_X: [(0.3, 0), (-0.27, 0), (0.01, 0), (0, 3), (0, -0.45 * 13), (0, 40)],
    ops.SHIFT_Y: [(0.3, 0), (-0.27, 0), (0.01, 0), (0, 3), (0, -0.45 * 13), (0, -40)],
    ops.AFFINE: [
        (0.9, -0.4, 3.3, 0.4, 0.9, -1.7),
        (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
        (0.0, -1.0, 13.0, 1.0, 0.0, 0.0),
        (1.7, 0.2, -4.0, -0.3, 2.1, -5.0),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("code", NUMBERS)
def test_every_operation(device, code):
    rng = np.random.default_rng(code)
    ways = (False, True) if code in (ops.SHIFT_X, ops.SHIFT_Y, ops.AFFINE) else (False,)
    steps = [[(code, cubic, numbers)] for numbers in NUMBERS[code] for cubic in ways]
    compare(device, make_images(rng, len(steps), 13), steps)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_smallest_images(device, size):
    rng = np.random.default_rng(size)
    steps = [[(code, True, numbers[-1])] for code, numbers in NUMBERS.items()]
    compare(device, make_images(rng, len(steps), size), steps)


def draw_step(rng):
    code = int(rng.choice(list(NUMBERS)))
    return code, bool(rng.integers(2)), NUMBERS[code][rng.integers(len(NUMBERS[code]))]


@pytest.mark.slow
def test_three_layers_one_upon_another(device):
    rng = np.random.default_rng(5)
    steps = [[draw_step(rng) for _ in range(3)] for _ in range(40)]
    compare(device, make_images(rng, len(steps), 9), steps)


@pytest.mark.slow
def test_more_pixels_than_a_program_takes(device):
    rng = np.random.default_rng(6)
    steps = [[(code, True, numbers[0])] for code, numbers in NUMBERS.items()]
    compare(device, make_images(rng, len(steps), 50), steps)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [224, 384])
def test_every_operation_at_full_size(device, size):
    rng = np.random.default_rng(size)
    steps = [[(c, cubic, n), draw_step(rng)] for c, numbers in NUMBERS.items() for n in numbers for cubic in (0, 1)]
    compare(device, make_images(rng, len(steps), size), steps)


def test_nothing_is_fused_that_pillow_rounds():
    for module in (augment_ops, augment_levels, augment_blur):
        assert not any(variant.fp_fusion for variant in module.variants())
