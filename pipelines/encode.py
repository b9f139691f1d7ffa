"""How one image of a source is stored: its JPEG file as it is, encoded anew, or as raw pixels."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps

from fastdeit.pipelines.beton import JPEG, RAW

Mode = Literal["auto", "jpeg", "raw"]
SMALL_SIDE = 64  # decoded images up to this side are stored raw in mode "auto"
JPEG_SIDE = 65500  # libjpeg writes no longer one
CHANGES = (
    "passed_through",
    "reencoded",
    "stored_raw",
    "resized",
    "rotated",  # as their EXIF orientation says
    "mode_converted",  # not RGB before
)


@dataclass(frozen=True)
class Encoding:
    """How images are stored.

    mode      "auto": a JPEG file as it is where it can be, any other image file as a JPEG; an image that comes
              decoded raw if its sides are at most 64 pixels, else as a JPEG. "jpeg": everything encoded anew.
              "raw": RGB pixels
    quality   of JPEGs that are encoded, 1 to 100; chroma is halved (4:2:0) below 95 and kept (4:4:4) from there
    max_side  longer sides are reduced to this many pixels (Lanczos with antialias); None: none

    Raises ValueError for options out of range.
    """

    mode: Mode = "auto"
    quality: int = 92
    max_side: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "jpeg", "raw"):
            raise ValueError(f"mode '{self.mode}' is not one of auto, jpeg, raw")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality {self.quality} is not from 1 to 100")
        if self.max_side is not None and self.max_side < 1:
            raise ValueError(f"max_side {self.max_side} is not a number of pixels: leave it out or give at least 1")


@dataclass(frozen=True)
class Stored:
    """Bytes of an image as the beton file holds them; `changes` are those of `CHANGES` that were made."""

    data: bytes
    height: int
    width: int
    mode: int
    changes: tuple[str, ...]


def encode(item: bytes | Image.Image | np.ndarray, encoding: Encoding) -> Stored:
    """`item`, a file's bytes or a decoded image ((H, W) or (H, W, 3) uint8 where an array), as it is stored.

    Pixels become 8-bit RGB as PIL's convert("RGB") makes them: gray is repeated, alpha dropped, CMYK converted;
    16 bits of gray are scaled to 8. The EXIF orientation is applied. A JPEG is passed through if it is RGB or
    gray, upright and small enough, and decodes to its end (at an eighth of its size, which reads every
    coefficient). Raises what PIL raises for a damaged image, ValueError for one that cannot be made RGB.
    """
    if isinstance(item, bytes):
        with Image.open(io.BytesIO(item)) as image:
            if encoding.mode == "auto" and _passes(image, encoding):
                width, height = image.size
                image.draft(None, (1, 1))
                image.load()
                return Stored(item, height, width, JPEG, ("passed_through",))
            return _store(image, encoding, raw=encoding.mode == "raw")
    image = Image.fromarray(item) if isinstance(item, np.ndarray) else item
    small = max(image.size) <= SMALL_SIDE
    return _store(image, encoding, raw=encoding.mode == "raw" or (encoding.mode == "auto" and small))


def _passes(image: Image.Image, encoding: Encoding) -> bool:
    fits = encoding.max_side is None or max(image.size) <= encoding.max_side
    return image.format == "JPEG" and image.mode in ("RGB", "L") and fits and _orientation(image) == 1


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(2, 9) else 1


def _store(image: Image.Image, encoding: Encoding, *, raw: bool) -> Stored:
    changes = ["stored_raw" if raw else "reencoded"]
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
        changes.append("rotated")
    if image.mode != "RGB":
        image = _to_rgb(image)
        changes.append("mode_converted")
    longer = max(image.size)
    if encoding.max_side is not None and longer > encoding.max_side:
        scale = encoding.max_side / longer
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        changes.append("resized")
    width, height = image.size
    if raw:
        return Stored(image.tobytes(), height, width, RAW, tuple(changes))
    if max(width, height) > JPEG_SIDE:
        raise ValueError(f"{width} x {height} pixels, and sides of JPEGs go up to {JPEG_SIDE}: give --max-side")
    file = io.BytesIO()
    subsampling = "4:4:4" if encoding.quality >= 95 else "4:2:0"
    image.save(file, "JPEG", quality=encoding.quality, subsampling=subsampling)
    return Stored(file.getvalue(), height, width, JPEG, tuple(changes))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # PIL's own conversion clips 16 bits at 255 instead of scaling them.
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("its pixels are integers beyond 16 bits; convert it to 8 bits first")
        image = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating point, whose range is unknown; convert it to 8 bits first")
    return image.convert("RGB")
