"""Replays any plan through Pillow, timm and torchvision. Use it to test the fast stages, and to look at a batch.

It is slow and plain. Pillow crops, resizes and flips; timm's own functions do the operations; torchvision normalises;
mixing follows `timm.data.Mixup`. Only the numbers come from the plan.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdeit.pipelines.batch import DecodedBatch
from fastdeit.pipelines.plan.philox import NOISE, normal_pair, philox
from fastdeit.pipelines.plan.plan import CUTMIX, MIXUP, OPS, OVERHANG, Plan

_GEOMETRIC = {
    "Rotate": "rotate",
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateXRel": "translate_x_rel",
    "TranslateYRel": "translate_y_rel",
}
_WITH_LEVELS = {"Posterize": "posterize", "Solarize": "solarize", "SolarizeAdd": "solarize_add"}
_WITH_FACTOR = {
    "Color": "color",
    "Contrast": "contrast",
    "Brightness": "brightness",
    "Sharpness": "sharpness",
    "GaussianBlur": "gaussian_blur",
}
_PLAIN = {"AutoContrast": "auto_contrast", "Equalize": "equalize", "Invert": "invert"}


def fill_color(mean: tuple[float, float, float]) -> tuple[int, ...]:
    """The color, 0..255, with which timm fills what a geometric operation uncovers."""
    return tuple(min(255, round(255 * x)) for x in mean)


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """Pillow 13's bicubic resize with any version of Pillow.

    Pillow 13 shrinks vertically first if the height shrinks more than twice as much as the width. Older versions always
    start with the horizontal pass. With one pass at a time, every version gives the same pixels.
    """
    shrink = image.height - height
    if shrink > 0 and shrink > 2 * (image.width - width):
        return image.resize((image.width, height), Image.Resampling.BICUBIC).resize(
            (width, height), Image.Resampling.BICUBIC
        )
    return image.resize((width, image.height), Image.Resampling.BICUBIC).resize(
        (width, height), Image.Resampling.BICUBIC
    )


def replay(image: np.ndarray | Image.Image, plan: Plan, sample: int, size: int, fill: tuple[int, ...]) -> Image.Image:
    """Sample `sample` of the plan, from its decoded image to (size, size) RGB, before normalisation.

    image  PIL image, or (height, width, 3) uint8
    fill   see `fill_color`
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    top, left, height, width = (int(v) for v in plan.crop[sample])
    out_height, out_width, from_row, from_column = (int(v) for v in plan.window[sample])
    image = resize(image.convert("RGB").crop((left, top, left + width, top + height)), out_height, out_width)
    image = _window(image, from_row, from_column, size)
    if plan.flip[sample]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for code, arg, interp in zip(plan.op[sample], plan.arg[sample], plan.interp[sample], strict=True):
        image = _operate(image, OPS[code], float(arg), int(interp), fill)
    return image


def _window(image: Image.Image, top: int, left: int, size: int) -> Image.Image:
    """The square of that place, reflected where it reaches beyond the image."""
    padded = np.pad(np.asarray(image), ((OVERHANG, OVERHANG), (OVERHANG, OVERHANG), (0, 0)), mode="reflect")
    rows, columns = slice(top + OVERHANG, top + OVERHANG + size), slice(left + OVERHANG, left + OVERHANG + size)
    return Image.fromarray(np.ascontiguousarray(padded[rows, columns]))


def _operate(image: Image.Image, name: str, arg: float, interp: int, fill: tuple[int, ...]) -> Image.Image:
    from timm.data import auto_augment

    def timms(function: str) -> Callable[..., Image.Image]:
        return getattr(auto_augment, function)

    if name == "Identity":
        return image
    if name in _PLAIN:
        return timms(_PLAIN[name])(image)
    if name in _GEOMETRIC:
        resample = Image.Resampling(interp)
        return timms(_GEOMETRIC[name])(image, arg, resample=resample, fillcolor=fill)
    if name == "Posterize" and arg == 0:  # recent Pillow raises on it
        return Image.new("RGB", image.size)
    if name in _WITH_LEVELS:
        return timms(_WITH_LEVELS[name])(image, int(arg))
    return timms(_WITH_FACTOR[name])(image, arg)


def erasing_noise(plan: Plan, sample: int, size: int) -> Tensor:
    """(3, size, size) float32 noise of a sample; the erased box shows a part of it."""
    count = 3 * size * size
    values = np.empty(-(-count // 4) * 4)
    with np.errstate(over="ignore"):
        for block in range(len(values) // 4):
            words = philox(plan.seed, block, plan.index[sample], plan.epoch, NOISE | np.uint32(plan.repeat[sample]))
            values[4 * block : 4 * block + 2] = normal_pair(words[0], words[1])
            values[4 * block + 2 : 4 * block + 4] = normal_pair(words[2], words[3])
    return torch.from_numpy(values[:count].astype(np.float32)).reshape(3, size, size)


def replay_batch(
    decoded: DecodedBatch,
    plan: Plan,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    noise: bool = True,
) -> Tensor:
    """The whole batch, (B, 3, size, size) float32: normalised, erased, mixed. Without `noise` nothing is erased."""
    from torchvision.transforms.functional import normalize, to_tensor

    fill = fill_color(mean)
    images = []
    for sample in range(len(plan)):
        image = replay(decoded.image(int(decoded.source[sample])), plan, sample, size, fill)
        tensor = normalize(to_tensor(image), list(mean), list(std))
        top, left, height, width = (int(v) for v in plan.erase[sample])
        if noise and height and width:
            box = (slice(None), slice(top, top + height), slice(left, left + width))
            tensor[box] = erasing_noise(plan, sample, size)[box]
        images.append(tensor)
    return _mix(torch.stack(images), plan)


def _mix(images: Tensor, plan: Plan) -> Tensor:
    for group, kind in enumerate(plan.mix):
        members = torch.from_numpy(plan.group == group)
        part, lam = images[members], float(plan.lam[group])
        if kind == CUTMIX:
            top, left, bottom, right = (int(v) for v in plan.box[group])
            part[:, :, top:bottom, left:right] = part.flip(0)[:, :, top:bottom, left:right]
        elif kind == MIXUP:
            part = part * lam + part.flip(0) * (1.0 - lam)
        images[members] = part
    return images
