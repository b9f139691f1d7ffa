"""Images of every kind that a data set may hold, and damage to them."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

_SIDES = ((42, 31), (67, 45), (97, 120))  # width, height: small files, in which damage hits something that matters


def _picture(seed: int, mode: str = "RGB") -> Image.Image:
    width, height = _SIDES[seed % len(_SIDES)]
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2)).convert(mode)


def _file(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _animation(seed: int, kind: str) -> bytes:
    return _file(_picture(seed), kind, save_all=True, append_images=[_picture(seed + len(_SIDES))])


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _levels(seed: int) -> Image.Image:
    width, height = _SIDES[seed % len(_SIDES)]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 1 << 16, (height, width), dtype=np.uint16))


# Extension and function of a seed. JPEG is what data sets hold most of, and what the loaders decode themselves.
KINDS: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "jpeg": ("jpg", lambda s: _file(_picture(s), "JPEG", quality=90)),
    "jpeg 4:2:2": ("jpg", lambda s: _file(_picture(s), "JPEG", quality=85, subsampling="4:2:2")),
    "jpeg 4:4:4": ("JPEG", lambda s: _file(_picture(s), "JPEG", quality=92, subsampling="4:4:4", optimize=True)),
    "jpeg progressive": ("JPEG", lambda s: _file(_picture(s), "JPEG", progressive=True)),
    "jpeg restarts": ("jpg", lambda s: _file(_picture(s), "JPEG", restart_marker_blocks=3)),
    "jpeg gray": ("jpg", lambda s: _file(_picture(s, "L"), "JPEG")),
    "jpeg cmyk": ("jpg", lambda s: _file(_picture(s, "CMYK"), "JPEG")),
    "jpeg exif": ("jpeg", lambda s: _file(_picture(s), "JPEG", exif=_exif(1 + s % 8))),
    "mpo": ("jpg", lambda s: _file(_picture(s), "MPO", save_all=True, append_images=[_picture(s + 1)])),
    "png": ("png", lambda s: _file(_picture(s), "PNG")),
    "png palette": ("png", lambda s: _file(_picture(s).quantize(20), "PNG", transparency=bytes(range(20)))),
    "png 16 bits": ("png", lambda s: _file(_levels(s), "PNG")),
    "png named jpeg": ("JPEG", lambda s: _file(_picture(s, "RGBA"), "PNG")),
    "apng": ("png", lambda s: _animation(s, "PNG")),
    "webp": ("webp", lambda s: _file(_picture(s), "WEBP", exif=_exif(6), lossless=bool(s % 2))),
    "gif named png": ("png", lambda s: _animation(s, "GIF")),
    "bmp": ("bmp", lambda s: _file(_picture(s), "BMP")),
    "tiff": ("tif", lambda s: _file(_picture(s), "TIFF", compression="tiff_lzw" if s % 2 else "tiff_deflate")),
    "ppm": ("ppm", lambda s: _file(_picture(s), "PPM")),
}
_LENGTHS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def mutate(data: bytes, rng: np.random.Generator, block: int = 64) -> bytes:
    """`data` with up to four damages: bits flipped, pieces overwritten, cut out, doubled, swapped or spliced in from
    elsewhere, lengths set to extremes, blocks of `block` bytes zeroed or repeated, the end cut off."""
    out = bytearray(data)
    for _ in range(min(4, int(rng.geometric(0.6)))):
        # Headers more often than what they announce.
        at = int(rng.integers(min(len(out), 64) if rng.random() < 0.4 else len(out)))
        length = int(rng.choice([1, 2, 4, 8, 37, 200]))
        match int(rng.integers(9)):
            case 0:
                out[at] ^= 1 << int(rng.integers(8))
            case 1:
                out[at : at + length] = rng.bytes(len(out[at : at + length]))
            case 2:
                del out[at : at + length]
            case 3:
                out[at:at] = out[at : at + length]
            case 4:
                other = int(rng.integers(len(out)))
                one, two = out[at : at + length], out[other : other + length]
                out[at : at + len(two)], out[other : other + len(one)] = two, one
            case 5:
                value = int(rng.choice([*_LENGTHS, len(out)]))
                size = 2 if value < 1 << 16 else 4
                out[at : at + size] = value.to_bytes(size, "big" if rng.random() < 0.5 else "little")
            case 6:
                first = at // block * block
                out[first : first + block] = bytes(block) if rng.random() < 0.5 else out[:block]
            case 7:
                other = int(rng.integers(len(data)))
                out[at:] = data[other:]
            case 8:
                del out[max(1, at) :]
        if not out:
            return bytes(data[:1])
    return bytes(out)


def mutant(kind: str, number: int, seed: int) -> bytes:
    """Mutant `number` of a kind, the same for the same `seed`; number 0 to 2 are the images as they were."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind), number])
    data = KINDS[kind][1](number % (2 * len(_SIDES)))
    if number < len(_SIDES):
        return data
    data = mutate(data, rng)
    return with_checksums(data) if "png" in kind and "gif" not in kind and number % 4 else data


def with_checksums(file: bytes) -> bytes:
    """A PNG file whose chunks, as far as they go, have the right checksums: it gets further into a decoder."""
    out = bytearray(file)
    at = 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        if end + 4 <= len(out):
            out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(out)
