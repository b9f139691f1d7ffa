"""Mutated images end in an ordinary error, or in the pixels that PIL makes of the very same bytes.

FASTDEIT_FUZZ multiplies the number of cases; a case that takes longer than a minute ends the process with a traceback.
"""

import faulthandler
import io
import os
import warnings
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from fastdeit.pipelines.conversion.encode import CHANGES, FORMATS, Encoding, encode
from fastdeit.pipelines.formats.beton_layout import JPEG

CASES = 24 * int(os.environ.get("FASTDEIT_FUZZ", "1"))  # of each seed
SECONDS = 60


def picture(mode="RGB", seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (31, 42, 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2)).convert(mode)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


SEEDS = {
    "jpeg": lambda: encoded(picture(), "JPEG"),
    "jpeg progressive": lambda: encoded(picture(), "JPEG", progressive=True),
    "jpeg rotated": lambda: encoded(picture(), "JPEG", exif=rotated()),
    "jpeg cmyk": lambda: encoded(picture("CMYK"), "JPEG", restart_marker_blocks=2),
    "mpo": lambda: encoded(picture(), "MPO", save_all=True, append_images=[picture(seed=1)]),
    "png": lambda: encoded(picture(), "PNG"),
    "png palette": lambda: encoded(picture().quantize(20), "PNG", transparency=bytes(range(20))),
    "png 16 bits": lambda: encoded(Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) * 70), "PNG"),
    "apng": lambda: encoded(picture(), "PNG", save_all=True, append_images=[picture(seed=1)]),
    "webp": lambda: encoded(picture(), "WEBP", exif=rotated()),
    "webp animated": lambda: encoded(picture(), "WEBP", save_all=True, append_images=[picture(seed=1)]),
    "gif": lambda: encoded(picture(), "GIF", save_all=True, append_images=[picture(seed=1)]),
    "bmp": lambda: encoded(picture(), "BMP"),
    "tiff": lambda: encoded(picture(), "TIFF"),
    "tiff lzw": lambda: encoded(picture(), "TIFF", compression="tiff_lzw", exif=rotated()),
    "tiff cmyk": lambda: encoded(picture("CMYK"), "TIFF", compression="tiff_deflate"),
    "ppm": lambda: encoded(picture(), "PPM"),
    "jpeg 2000": lambda: encoded(picture(), "JPEG2000"),
}


def mutate(data, rng):
    """Bits flipped, pieces overwritten, cut out, doubled or swapped, lengths set to extremes, the end cut off."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        # Headers more often than what they announce.
        at = int(rng.integers(min(len(data), 64) if rng.random() < 0.4 else len(data)))
        length = int(rng.choice([1, 2, 4, 8, 37, 200]))
        match rng.integers(8):
            case 0:
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                data[at : at + length] = rng.bytes(len(data[at : at + length]))
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                other = int(rng.integers(len(data)))
                one, two = data[at : at + length], data[other : other + length]
                data[at : at + len(two)], data[other : other + len(one)] = two, one
            case 5:
                value = int(rng.choice([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, len(data)]))
                size = 2 if value < 1 << 16 else 4
                data[at : at + size] = value.to_bytes(size, "big" if rng.random() < 0.5 else "little")
            case 6:
                data[at : at + length] = bytes([int(rng.choice([0, 0x7F, 0x80, 0xFF]))]) * length
            case 7:
                del data[max(1, at) :]
        if not data:
            break
    return bytes(data)


def with_checksums(file):
    """A PNG file whose chunks, as far as they go, have the right checksums: it gets further into the decoder."""
    file = bytearray(file)
    at = 8
    while at + 12 <= len(file):
        end = at + 8 + int.from_bytes(file[at : at + 4], "big")
        file[end : end + 4] = zlib.crc32(file[at + 4 : end]).to_bytes(4, "big") if end + 4 <= len(file) else b""
        at = end + 4
    return bytes(file)


def judge(file):
    """PIL's decode of all of the file, upright, as RGB; 16 bits as floats of 8."""
    image = Image.open(io.BytesIO(file), formats=FORMATS)
    image.load()
    # EXIF that cannot be read, or written again, says nothing.
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:
        image = image.copy()
    if image.mode.startswith("I"):
        return np.repeat(np.asarray(image)[:, :, None] / 257, 3, axis=2)
    return np.asarray(image.convert("RGB"))


def check(file, counts):
    for encoding in (Encoding(mode="raw"), Encoding(quality=100)):
        try:
            stored = encode(file, encoding)
        except Exception as error:
            counts[type(error).__name__] += 1
            continue
        counts[stored.changes[0]] += 1
        assert set(stored.changes) <= set(CHANGES)
        expected = judge(file)
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
            file = with_checksums(file)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(file, counts)
        except AssertionError as error:
            error.add_note(f"{kind}, case {case}: {file.hex()}")
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
    print(kind, dict(counts))  # shown by -rP
    assert len(counts) > 1
