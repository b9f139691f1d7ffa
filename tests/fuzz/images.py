"""Images of every kind that a data set may hold, and mutants of them."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.helpers.damage import mutate, with_png_checksums
from tests.helpers.pictures import encoded, exif, picture

_SIDES = ((42, 31), (67, 45), (97, 120))  # width, height: small files, in which damage hits something that matters


def _picture(seed: int, mode: str = "RGB") -> Image.Image:
    return picture(seed, _SIDES[seed % len(_SIDES)], mode)


def _animation(seed: int, kind: str) -> bytes:
    return encoded(_picture(seed), kind, save_all=True, append_images=[_picture(seed + len(_SIDES))])


def _levels(seed: int) -> Image.Image:
    width, height = _SIDES[seed % len(_SIDES)]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 1 << 16, (height, width), dtype=np.uint16))


# Extension and function of a seed. JPEG is what data sets hold most of, and what the loaders decode themselves.
KINDS: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "jpeg": ("jpg", lambda s: encoded(_picture(s), "JPEG", quality=90)),
    "jpeg 4:2:2": ("jpg", lambda s: encoded(_picture(s), "JPEG", quality=85, subsampling="4:2:2")),
    "jpeg 4:4:4": ("JPEG", lambda s: encoded(_picture(s), "JPEG", quality=92, subsampling="4:4:4", optimize=True)),
    "jpeg progressive": ("JPEG", lambda s: encoded(_picture(s), "JPEG", progressive=True)),
    "jpeg restarts": ("jpg", lambda s: encoded(_picture(s), "JPEG", restart_marker_blocks=3)),
    "jpeg gray": ("jpg", lambda s: encoded(_picture(s, "L"), "JPEG")),
    "jpeg cmyk": ("jpg", lambda s: encoded(_picture(s, "CMYK"), "JPEG")),
    "jpeg exif": ("jpeg", lambda s: encoded(_picture(s), "JPEG", exif=exif(1 + s % 8))),
    "mpo": ("jpg", lambda s: encoded(_picture(s), "MPO", save_all=True, append_images=[_picture(s + 1)])),
    "png": ("png", lambda s: encoded(_picture(s), "PNG")),
    "png palette": ("png", lambda s: encoded(_picture(s).quantize(20), "PNG", transparency=bytes(range(20)))),
    "png 16 bits": ("png", lambda s: encoded(_levels(s), "PNG")),
    "png named jpeg": ("JPEG", lambda s: encoded(_picture(s, "RGBA"), "PNG")),
    "apng": ("png", lambda s: _animation(s, "PNG")),
    "webp": ("webp", lambda s: encoded(_picture(s), "WEBP", exif=exif(6), lossless=bool(s % 2))),
    "gif named png": ("png", lambda s: _animation(s, "GIF")),
    "bmp": ("bmp", lambda s: encoded(_picture(s), "BMP")),
    "tiff": ("tif", lambda s: encoded(_picture(s), "TIFF", compression="tiff_lzw" if s % 2 else "tiff_deflate")),
    "ppm": ("ppm", lambda s: encoded(_picture(s), "PPM")),
}


def mutant(kind: str, number: int, seed: int) -> bytes:
    """Mutant `number` of a kind, the same for the same `seed`; number 0 to 2 are the images as they were."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind), number])
    data = KINDS[kind][1](number % (2 * len(_SIDES)))
    if number < len(_SIDES):
        return data
    data = mutate(data, rng)
    return with_png_checksums(data) if "png" in kind and "gif" not in kind and number % 4 else data
