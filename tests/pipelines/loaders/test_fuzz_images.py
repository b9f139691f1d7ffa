"""Mutated images end in an ordinary error, or in the pixels that PIL makes of the very same bytes.

FASTDEIT_FUZZ multiplies the number of cases; a case that takes longer than a minute ends the process with a traceback.
"""

import io
import os
import warnings
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from damage import guarded, mutate, with_png_checksums
from fastdeit.pipelines.conversion.encode import CHANGES, Encoding, encode
from fastdeit.pipelines.formats.beton_layout import JPEG
from pictures import encoded, exif
from pictures import picture as noise
from tests.fuzz.judge import pillow

CASES = 24 * int(os.environ.get("FASTDEIT_FUZZ", "1"))  # of each seed


def picture(mode="RGB", seed=0):
    return noise(seed, (42, 31), mode)


SEEDS = {
    "jpeg": lambda: encoded(picture(), "JPEG"),
    "jpeg progressive": lambda: encoded(picture(), "JPEG", progressive=True),
    "jpeg rotated": lambda: encoded(picture(), "JPEG", exif=exif(6)),
    "jpeg cmyk": lambda: encoded(picture("CMYK"), "JPEG", restart_marker_blocks=2),
    "mpo": lambda: encoded(picture(), "MPO", save_all=True, append_images=[picture(seed=1)]),
    "png": lambda: encoded(picture(), "PNG"),
    "png palette": lambda: encoded(picture().quantize(20), "PNG", transparency=bytes(range(20))),
    "png 16 bits": lambda: encoded(Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) * 70), "PNG"),
    "apng": lambda: encoded(picture(), "PNG", save_all=True, append_images=[picture(seed=1)]),
    "webp": lambda: encoded(picture(), "WEBP", exif=exif(6)),
    "webp animated": lambda: encoded(picture(), "WEBP", save_all=True, append_images=[picture(seed=1)]),
    "gif": lambda: encoded(picture(), "GIF", save_all=True, append_images=[picture(seed=1)]),
    "bmp": lambda: encoded(picture(), "BMP"),
    "tiff": lambda: encoded(picture(), "TIFF"),
    "tiff lzw": lambda: encoded(picture(), "TIFF", compression="tiff_lzw", exif=exif(6)),
    "tiff cmyk": lambda: encoded(picture("CMYK"), "TIFF", compression="tiff_deflate"),
    "ppm": lambda: encoded(picture(), "PPM"),
    "jpeg 2000": lambda: encoded(picture(), "JPEG2000"),
}


def check(file, counts):
    for encoding in (Encoding(mode="raw"), Encoding(quality=100)):
        try:
            stored = encode(file, encoding)
        except Exception as error:
            counts[type(error).__name__] += 1
            continue
        counts[stored.changes[0]] += 1
        assert set(stored.changes) <= set(CHANGES)
        expected = pillow(file)
        assert expected.shape == (stored.height, stored.width, 3)
        if "passed_through" in stored.changes:
            assert stored.data == file
        elif stored.mode == JPEG:
            image = Image.open(io.BytesIO(stored.data))
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert np.abs(np.asarray(image) - expected.astype(float)).mean() < 2
        else:
            pixels = np.frombuffer(stored.data, np.uint8).reshape(expected.shape)
            assert np.abs(pixels - expected.astype(float)).max() <= (0.51 if expected.dtype == float else 0)


@pytest.mark.parametrize("kind", SEEDS)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_mutated_images(kind):
    seed = SEEDS[kind]()
    counts = Counter()
    check(seed, counts)
    assert not counts.keys() - set(CHANGES)
    rng = np.random.default_rng(list(SEEDS).index(kind))
    for case in range(CASES):
        file = mutate(seed, rng)
        if "png" in kind and case % 2:
            file = with_png_checksums(file)
        with guarded(f"{kind}, case {case}", file), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(file, counts)
    print(kind, dict(counts))  # shown by -rP
    assert len(counts) > 1
