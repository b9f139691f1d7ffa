"""Random plans, random pictures and JPEGs of every kind for the tests of loaders and stages."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fastdeit.pipelines.batch import DecodedBatch
from fastdeit.pipelines.loaders.choose import LOADERS, open_loader
from fastdeit.pipelines.loaders.prefetch import make_pool
from fastdeit.pipelines.plan.order import EvalOrder
from fastdeit.pipelines.plan.plan import BICUBIC, BILINEAR, CUTMIX, NO_MIX, OPS, OVERHANG, Plan, whole_windows
from ordered import Ordered, need_loader


@pytest.fixture
def pool():
    with make_pool(4) as pool:
        yield pool


@pytest.fixture(params=LOADERS)
def opened(request, pool):
    """Opens the loader under test on a data set and an order; by default evaluation in batches of 8."""
    need_loader(request.param)

    def open_one(dataset, order=None, threads=3, regions=None, **options):
        loader = open_loader(request.param, dataset, pool=pool, threads=threads, **options)
        return Ordered(loader, order or EvalOrder(len(dataset), batch=8), regions)

    open_one.name = request.param
    return open_one


RANGES = {
    "Rotate": (-30.0, 30.0),
    "Posterize": (0, 8),
    "Solarize": (0, 256),
    "SolarizeAdd": (0, 128),
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), (0.0, 1.9)),
    **dict.fromkeys(("ShearX", "ShearY"), (-0.3, 0.3)),
    **dict.fromkeys(("TranslateXRel", "TranslateYRel"), (-0.45, 0.45)),
    "GaussianBlur": (0.0, 3.0),
}


def _draw_arg(rng: np.random.Generator, name: str) -> float:
    low, high = RANGES.get(name, (0.0, 0.0))
    if isinstance(low, int):
        return float(rng.integers(low, int(high) + 1))
    return float(rng.uniform(low, high))


def _make_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A picture: noise, a smooth one, one of few levels, or a single colour."""
    kind = rng.integers(0, 8)
    if kind == 0:
        return np.full((height, width, 3), rng.choice([0, 255, int(rng.integers(256))]), np.uint8)
    if kind == 1:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == 2:
        return (rng.integers(0, 8, (height, width, 3)) * 20 + 40).astype(np.uint8)
    coarse = rng.integers(0, 256, (max(2, height // 20), max(2, width // 20), 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _make_decoded(rng: np.random.Generator, sizes: list[tuple[int, int]], samples: int) -> DecodedBatch:
    images = [_make_image(rng, h, w) for h, w in sizes]
    lengths = np.array([image.size for image in images], np.int64)
    return DecodedBatch(
        epoch=3,
        step=5,
        pixels=np.concatenate([image.reshape(-1) for image in images]),
        offset=np.cumsum(lengths) - lengths,
        height=np.array([h for h, _ in sizes], np.int32),
        width=np.array([w for _, w in sizes], np.int32),
        source=rng.integers(0, len(images), samples).astype(np.int32),
        index=rng.integers(0, 1_281_167, samples).astype(np.int64),
        label=rng.integers(0, 10, samples).astype(np.int64),
    )


def _make_plan(
    rng: np.random.Generator, decoded: DecodedBatch, size: int, *, groups: int = 1, layers: int = 2, erase: float = 0.25
) -> Plan:
    count = len(decoded.index)
    crop, box = np.zeros((count, 4), np.int32), np.zeros((count, 4), np.int32)
    window = whole_windows(count, size)
    for sample, slot in enumerate(decoded.source):
        rows, columns = int(decoded.height[slot]), int(decoded.width[slot])
        height, width = int(rng.integers(1, rows + 1)), int(rng.integers(1, columns + 1))
        if rng.random() < 0.1:
            height, width = min(rows, size), int(rng.integers(1, columns + 1))
        if rng.random() < 0.1:
            width = min(columns, size)
        crop[sample] = rng.integers(0, rows - height + 1), rng.integers(0, columns - width + 1), height, width
        if rng.random() < 0.25:  # a window, which may reach beyond its resized crop
            # Half of these leave an axis as it is.
            out = [
                max(size, side if rng.random() < 0.5 else int(rng.integers(size, 2 * size)))
                for side in crop[sample, 2:]
            ]
            window[sample] = *out, *(int(rng.integers(-OVERHANG, side - size + OVERHANG + 1)) for side in out)
        if rng.random() < erase:
            height, width = rng.integers(1, size + 1, 2)
            box[sample] = rng.integers(0, size - height + 1), rng.integers(0, size - width + 1), height, width
    op = np.where(rng.random((count, layers)) < 0.8, rng.integers(0, len(OPS), (count, layers)), 0).astype(np.int8)
    mix = rng.integers(0, 3, groups).astype(np.int8)
    lam, cut = rng.random(groups), np.zeros((groups, 4), np.int32)
    for group in range(groups):
        if mix[group] == NO_MIX:
            lam[group] = 1.0
        elif mix[group] == CUTMIX:
            top, bottom = sorted(rng.integers(0, size + 1, 2))
            left, right = sorted(rng.integers(0, size + 1, 2))
            cut[group] = top, left, bottom, right
            lam[group] = 1.0 - (bottom - top) * (right - left) / (size * size)
    return Plan(
        index=decoded.index,
        repeat=rng.integers(0, 3, count).astype(np.int32),
        crop=crop,
        window=window,
        flip=rng.random(count) < 0.5,
        op=op,
        arg=np.array([[_draw_arg(rng, OPS[code]) for code in row] for row in op]).reshape(count, layers),
        interp=rng.choice([BILINEAR, BICUBIC], (count, layers)).astype(np.int8),
        erase=box,
        group=np.repeat(np.arange(groups, dtype=np.int32), count // groups),
        mix=mix,
        lam=lam,
        box=cut,
        img_size=size,
        seed=int(rng.integers(2**63)),
        epoch=3,
    )


@pytest.fixture(scope="session")
def make_image() -> Callable[..., np.ndarray]:
    return _make_image


@pytest.fixture(scope="session")
def make_decoded() -> Callable[..., DecodedBatch]:
    return _make_decoded


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., Plan]:
    return _make_plan


@pytest.fixture(scope="session")
def drawn() -> Callable[..., tuple[DecodedBatch, Plan]]:
    """Function: `samples` decoded images of `sizes`, and a plan for them at an image size."""

    def draw(seed: int, sizes: list[tuple[int, int]], samples: int, size: int, **options: Any):
        rng = np.random.default_rng(seed)
        decoded = _make_decoded(rng, sizes, samples)
        return decoded, _make_plan(rng, decoded, size, **options)

    return draw


@pytest.fixture(scope="session")
def draw_arg() -> Callable[[np.random.Generator, str], float]:
    """Draws an argument for an operation, over more than the range that the recipe uses."""
    return _draw_arg


@pytest.fixture(scope="session")
def sampled_jpeg():
    """Function: a JPEG of about `size` (width, height) and of any sampling of chroma, and its size.

    Pillow does not write 4:4:0 and 4:1:1. A minimum coded unit of these has as many blocks as one of 4:2:2 and 4:2:0,
    so that a header that says otherwise makes another picture of the same blocks.
    """

    def encode(seed, size, mode="RGB", **options):
        noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        file = io.BytesIO()
        image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1)).convert(mode)
        image.save(file, "JPEG", **{"quality": 90, **options})
        return file.getvalue()

    def make(seed, size, sampling, **options):
        if sampling == "gray":
            return encode(seed, size, "L", **options), size
        if sampling not in ("4:4:0", "4:1:1"):
            return encode(seed, size, subsampling=sampling, **options), size
        tall = sampling == "4:4:0"
        wide, high, old, new, way = (16, 8, 0x21, 0x12, "4:2:2") if tall else (16, 16, 0x22, 0x41, "4:2:0")
        units = -(-size[0] // wide), -(-size[1] // high)
        data = bytearray(encode(seed, (units[0] * wide, units[1] * high), subsampling=way, **options))
        frame = data.index(b"\xff\xc2" if "progressive" in options else b"\xff\xc0")
        assert data[frame + 11] == old
        data[frame + 11] = new
        width, height = (units[0] * 8, units[1] * 16) if tall else (units[0] * 32, units[1] * 8)
        if "progressive" not in options:  # whose scans of one component leave out what is beyond the edge
            width, height = width - seed % 7, height - seed % 5
        data[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        return bytes(data), (width, height)

    return make
