"""Encodes one image of a source for storage: its JPEG file unchanged, a new JPEG, or raw pixels."""

import io
import re
import warnings
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.beton_layout import JPEG, MAX_PIXELS, MAX_SCANS, MAX_SIDE, RAW

Mode = Literal["auto", "jpeg", "raw"]
MAX_TILE = 1 << 24  # pixels of a TIFF tile that is larger than its image
SMALL_SIDE = 64  # mode "auto" stores decoded images up to this side raw
JPEG_SIDE = 65500  # the longest that libjpeg writes
CHANGES = (
    "passed_through",
    "reencoded",
    "stored_raw",
    "resized",
    "rotated",  # by their EXIF orientation
    "mode_converted",  # not RGB before
    "first_frame",  # of an animation, or page of several
    "exif_unreadable",  # taken as upright
    "warned_of",  # PIL warned
)
# The formats that data sets hold. PIL's other readers start programs (EPS) or guess (raw formats).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Encoding:
    """How images are stored.

    mode      "auto": a JPEG file unchanged if possible, any other image file as a new JPEG; a decoded image raw if
              its sides are at most 64 pixels, else as a JPEG. "jpeg": a new JPEG of every image. "raw": RGB pixels
    quality   of new JPEGs, 1 to 100; chroma is halved (4:2:0) below 95 and kept (4:4:4) from 95 on
    max_side  the longer side is reduced to this many pixels (Lanczos with antialias); None: no limit

    Raises UserError for options out of range.
    """

    mode: Mode = "auto"
    quality: int = 92
    max_side: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "jpeg", "raw"):
            raise UserError(f"mode '{self.mode}' is not one of auto, jpeg, raw")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality {self.quality} is not from 1 to 100")
        if self.max_side is not None and self.max_side < 1:
            raise UserError(f"max_side {self.max_side} is not a number of pixels: leave it out or give at least 1")


@dataclass(frozen=True)
class Stored:
    """The bytes to store for an image; `changes` lists which of `CHANGES` were made."""

    data: bytes
    height: int
    width: int
    mode: int
    changes: tuple[str, ...]


def encode(item: bytes | Image.Image | np.ndarray, encoding: Encoding) -> Stored:
    """Encode `item`: a file's bytes, or a decoded image (an array is (H, W) or (H, W, 3) uint8).

    PIL's convert("RGB") makes the pixels 8-bit RGB: it repeats gray, drops alpha and converts CMYK. 16-bit gray is
    scaled to 8 bits. The EXIF orientation is applied; the first frame of an animation is taken. A JPEG passes through
    if it is RGB or gray, upright, small enough, and decodes to its end (at an eighth of its size, which reads every
    coefficient).

    Raises UserError for an image of more than `MAX_PIXELS`, before decoding it, of more than `MAX_SCANS`, or one that
    cannot become RGB. PIL's own errors pass for a damaged image or a format outside `FORMATS`.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stored = _encode(item, encoding)
    return replace(stored, changes=(*stored.changes, "warned_of")) if caught else stored


def _encode(item: bytes | Image.Image | np.ndarray, encoding: Encoding) -> Stored:
    if not isinstance(item, bytes):
        image = Image.fromarray(item) if isinstance(item, np.ndarray) else item
        small = max(image.size) <= SMALL_SIDE
        return _store(image, encoding, raw=encoding.mode == "raw" or (encoding.mode == "auto" and small))
    with _open(item) as image:
        _check_size(image)
        huffman = image.format in ("JPEG", "MPO") and _check_jpeg(item)
        if encoding.mode == "auto" and huffman and _passes(image, encoding):
            width, height = image.size
            image.draft(None, (1, 1))
            image.load()
            return Stored(item, height, width, JPEG, ("passed_through",))
        return _store(image, encoding, raw=encoding.mode == "raw")


def decode(data: bytes) -> Image.Image:
    """The pixels of an image file as `encode` makes them: upright, 8-bit RGB. Raises what `encode` raises."""
    with _open(data) as image:
        _check_size(image)
        if image.format in ("JPEG", "MPO"):
            _check_jpeg(data)
        image.load()
        return _upright_rgb(image, [])


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UserError(f"{error}: at most {MAX_PIXELS} pixels are decoded") from error


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(f"{width} x {height} pixels, but at most {MAX_PIXELS} are decoded: reduce it first")
    # Tiles are unpacked whole, even beyond the edges of the image.
    tags = getattr(image, "tag_v2", {})
    across, down = tags.get(TiffImagePlugin.TILEWIDTH), tags.get(TiffImagePlugin.TILELENGTH)
    if isinstance(across, int) and isinstance(down, int) and across * down > max(width * height, MAX_TILE):
        raise UserError(
            f"{width} x {height} pixels in tiles of {across} x {down}, but a tile larger than its image may have "
            f"at most {MAX_TILE} pixels: save it without tiles"
        )


# Any marker that cannot occur within a scan.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
_NOT_HUFFMAN = {0xC3, 0xC5, 0xC6, 0xC7, *range(0xC9, 0xD0)} - {0xCC}


def _check_jpeg(data: bytes) -> bool:
    """Whether every decoder reads this kind of JPEG: Huffman coded, sequential or progressive.

    Raises UserError if the file ends before its image, or has more scans than `MAX_SCANS`. Markers: ITU T.81, annex B.
    """
    at, scans, common = 0, 0, True
    while marker := _MARKER.search(data, at):
        kind, at = marker[0][1], marker.end()
        if kind == _EOI:
            return common
        scans += kind == _SOS
        common &= kind not in _NOT_HUFFMAN
        if scans > MAX_SCANS:
            raise UserError(
                f"a JPEG of more than {MAX_SCANS} scans; each one costs a full decoding pass: encode it again"
            )
        if kind not in (_SOI, _TEM):
            at += int.from_bytes(data[at : at + 2], "big")
    raise UserError("truncated: the file ends before the image does")


def _passes(image: Image.Image, encoding: Encoding) -> bool:
    fits = encoding.max_side is None or max(image.size) <= encoding.max_side
    return image.format == "JPEG" and image.mode in ("RGB", "L") and fits and _orientation(image) == 1


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation, 1 to 8; None if the EXIF cannot be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    # On damaged EXIF, PIL raises almost anything.
    except Exception:
        return None
    return value if value in _UPRIGHT else 1


def _store(image: Image.Image, encoding: Encoding, *, raw: bool) -> Stored:
    _check_size(image)
    changes = ["stored_raw" if raw else "reencoded"]
    if getattr(image, "is_animated", False):
        changes.append("first_frame")
    image.load()
    image = _upright_rgb(image, changes)
    longer = max(image.size)
    if encoding.max_side is not None and longer > encoding.max_side:
        scale = encoding.max_side / longer
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        changes.append("resized")
    width, height = image.size
    most, what = (MAX_SIDE, "raw pixels") if raw else (JPEG_SIDE, "JPEGs")
    if max(width, height) > most:
        raise UserError(f"{width} x {height} pixels, but sides of {what} go up to {most}: give --max-side")
    if raw:
        return Stored(image.tobytes(), height, width, RAW, tuple(changes))
    file = io.BytesIO()
    subsampling = "4:4:4" if encoding.quality >= 95 else "4:2:0"
    image.save(file, "JPEG", quality=encoding.quality, subsampling=subsampling)
    return Stored(file.getvalue(), height, width, JPEG, tuple(changes))


def _upright_rgb(image: Image.Image, changes: list[str]) -> Image.Image:
    """A loaded image in upright RGB; appends to `changes` what that took."""
    # After loading: PIL turns a TIFF upright as it loads it.
    orientation = _orientation(image)
    if orientation is None:
        changes.append("exif_unreadable")
    elif orientation != 1:
        image = image.transpose(_UPRIGHT[orientation])
        changes.append("rotated")
    if image.mode != "RGB":
        image = _to_rgb(image)
        changes.append("mode_converted")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # PIL's own conversion clips 16-bit values at 255 instead of scaling them.
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise UserError("its pixels are integers beyond 16 bits; convert it to 8 bits first")
        image = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise UserError("its pixels are floating point, whose range is unknown; convert it to 8 bits first")
    return image.convert("RGB")
