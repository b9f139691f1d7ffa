"""`python -m tests.contact_sheet FILE`: every operation of RandAugment at three magnitudes, Pillow's and ours.

The left picture of each pair is timm's own function on Pillow (`fastdeit.pipelines.plan.replay`), the right one comes
from the host stage, which is bit-identical to the device stage. The command counts the pairs that differ. The default
photograph is scikit-learn's `china.jpg` (CC BY).
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from timm.data import auto_augment
from tqdm import tqdm

from fastdeit.cli import parse, run
from fastdeit.pipelines.batch import DecodedBatch
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.host.stage import HostStage
from fastdeit.pipelines.plan.plan import BICUBIC, CODE, INCREASING, Plan, whole_windows
from fastdeit.pipelines.plan.replay import fill_color, replay

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAGNITUDES = (3, 6, 9)  # of 10; the recipe uses 9
_BLOCKS, _GAP, _LABEL, _HEAD = 2, 4, 104, 34
_INK, _FAINT = "#202020", "#707070"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw the sheet."""

    file: Path = Path("docs/images/randaugment.jpg")
    photo: Path | None = None  # None: scikit-learn's china.jpg
    size: int = 96  # side of a picture, pixels
    quality: int = 86  # of a JPEG


def photograph(path: Path | None) -> np.ndarray:
    """The photograph as (height, width, 3) uint8. Raises UserError if there is none."""
    if path is not None:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise UserError("the photograph is scikit-learn's: pip install 'fastdeit[demo]', or give --photo") from error
    return load_sample_image("china.jpg")


def strength(name: str, magnitude: float) -> float:
    """The argument that timm passes to an operation of the "increasing" set, with positive sign; 0 if it has none."""
    increasing = f"{name}Increasing" if f"{name}Increasing" in auto_augment.LEVEL_TO_ARG else name
    level_to_arg = auto_augment.LEVEL_TO_ARG[increasing]
    if level_to_arg is None:
        return 0.0
    (value,) = level_to_arg(magnitude, {"translate_pct": 0.45})
    enhances = name in ("Color", "Contrast", "Brightness", "Sharpness")
    return 1.0 + abs(value - 1.0) if enhances else abs(float(value))


def plan_of(photo: np.ndarray, names: Sequence[str], size: int) -> Plan:
    """One sample per operation and magnitude, each of the photograph's middle square."""
    height, width = photo.shape[:2]
    side, count = min(height, width), len(names) * len(MAGNITUDES)
    strengths = [strength(name, magnitude) for name in names for magnitude in MAGNITUDES]
    return Plan(
        index=np.arange(count),
        repeat=np.zeros(count, np.int32),
        crop=np.tile(np.array([(height - side) // 2, (width - side) // 2, side, side], np.int32), (count, 1)),
        window=whole_windows(count, size),
        flip=np.zeros(count, bool),
        op=np.repeat([CODE[name] for name in names], len(MAGNITUDES)).astype(np.int8)[:, None],
        arg=np.array(strengths)[:, None],
        interp=np.full((count, 1), BICUBIC, np.int8),
        erase=np.zeros((count, 4), np.int32),
        group=np.zeros(count, np.int32),
        mix=np.zeros(1, np.int8),
        lam=np.ones(1),
        box=np.zeros((1, 4), np.int32),
        img_size=size,
        seed=0,
        epoch=0,
    )


def pairs(photo: np.ndarray, plan: Plan, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pillow's picture and ours for every sample, (size, size, 3) uint8."""
    decoded = DecodedBatch(
        epoch=0,
        step=0,
        pixels=np.ascontiguousarray(photo).reshape(-1),
        offset=np.zeros(1, np.int64),
        height=np.array([photo.shape[0]], np.int32),
        width=np.array([photo.shape[1]], np.int32),
        source=np.zeros(len(plan), np.int32),
        index=plan.index,
        label=np.zeros(len(plan), np.int64),
    )
    with ThreadPoolExecutor(1) as pool:
        normalised = HostStage(size, MEAN, STD, pool=pool, threads=1)(decoded, plan).images.numpy()
    levels = 255 * (normalised * np.reshape(STD, (3, 1, 1)) + np.reshape(MEAN, (3, 1, 1)))
    ours = np.rint(levels).astype(np.uint8).transpose(0, 2, 3, 1)
    samples = tqdm(range(len(plan)), desc="Pillow", disable=None)
    pillows = [np.asarray(replay(photo, plan, sample, size, fill_color(MEAN))) for sample in samples]
    return list(zip(pillows, ours, strict=True))


def sheet(photo: np.ndarray, size: int, names: Sequence[str] = INCREASING) -> tuple[Image.Image, int]:
    """The sheet, and the number of our pictures that differ from Pillow's in any level."""
    plan = plan_of(photo, names, size)
    pictures = pairs(photo, plan, size)
    different = sum(not np.array_equal(*pair) for pair in pictures)
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    rows = -(-len(names) // _BLOCKS)
    pair_width = 2 * size + 2 * _GAP
    block = _LABEL + len(MAGNITUDES) * (pair_width + _GAP)
    picture = Image.new("RGB", (_BLOCKS * block + _GAP, _HEAD + rows * (size + _GAP) + 22), "white")
    draw = ImageDraw.Draw(picture)
    for column in range(_BLOCKS):
        for column_in_block, magnitude in enumerate(MAGNITUDES):
            x = column * block + _LABEL + column_in_block * (pair_width + _GAP)
            draw.text((x, 2), f"magnitude {magnitude}", fill=_INK, font=font)
            draw.text((x, 18), "Pillow", fill=_FAINT, font=small)
            draw.text((x + size + 2, 18), "fastdeit", fill=_FAINT, font=small)
    for number, name in enumerate(names):
        left, top = number // rows * block, _HEAD + number % rows * (size + _GAP)
        draw.text((left + 6, top + size / 2 - 16), name, fill=_INK, font=font)
        for place in range(len(MAGNITUDES)):
            sample = number * len(MAGNITUDES) + place
            x = left + _LABEL + place * (pair_width + _GAP)
            for picture_of, offset in zip(pictures[sample], (0, size + 2), strict=True):
                picture.paste(Image.fromarray(picture_of), (x + offset, top))
            if place == 0 and plan.arg[sample, 0]:
                shown = ", ".join(f"{plan.arg[sample + i, 0]:.3g}" for i in range(len(MAGNITUDES)))
                draw.text((left + 6, top + size / 2), shown, fill=_FAINT, font=small)
    summary = f"{len(pictures) - different} of {len(pictures)} are equal to Pillow's in every level."
    draw.text((6, picture.height - 18), summary, fill=_INK, font=font)
    return picture, different


def draw_sheet(options: Options) -> bool:
    """Draw, save and report; return whether every picture of ours equals Pillow's."""
    picture, different = sheet(photograph(options.photo), options.size)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(options.file, quality=options.quality)
    print(f"{options.file}: {different} of {len(INCREASING) * len(MAGNITUDES)} pictures differ from Pillow's")
    return not different


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit status 1 if a picture differs from Pillow's."""

    if not run(lambda: draw_sheet(parse(Options, "python -m tests.contact_sheet", argv))):
        sys.exit(1)
