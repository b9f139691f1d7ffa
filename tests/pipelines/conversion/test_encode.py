"""Odd and hostile images, judged by PIL on the same bytes or by pixels that are known."""

import io
import struct
import warnings
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from fastdeit.pipelines.conversion.encode import CHANGES, MAX_PIXELS, MAX_SCANS, Encoding, encode
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.beton_layout import JPEG
from pictures import encoded, exif
from pictures import picture as noise
from refusals import refused
from system import run_python

AUTO, RAW = Encoding(), Encoding(mode="raw")


def picture(size=(60, 44), seed=0):
    return noise(seed, size)


def raw_pixels(file):
    stored = encode(file, RAW)
    assert set(stored.changes) <= set(CHANGES)
    return np.frombuffer(stored.data, np.uint8).reshape(stored.height, stored.width, 3), stored.changes


def judged(file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB"))


def png(width, height, depth, colour, rows, extra=b""):
    """A PNG file of those rows (bytes each), written by hand as PIL writes no RGB of 16 bits."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def palette():
    image = picture().quantize(40)
    image.info["transparency"] = 3
    return image


def ycck():
    """PIL writes CMYK only; Adobe's marker says whether it is that (0) or YCCK (2)."""
    file = bytearray(encoded(picture().convert("CMYK"), "JPEG", quality=95))
    at = file.index(b"Adobe")
    assert file[at + 11] == 0
    file[at + 11] = 2
    return bytes(file)


KINDS = {
    "cmyk": lambda: encoded(picture().convert("CMYK"), "JPEG", quality=95),
    "ycck": ycck,
    "gray": lambda: encoded(picture().convert("L"), "JPEG"),
    "palette": lambda: encoded(palette(), "PNG"),
    "palette, alpha each": lambda: encoded(picture().quantize(9), "PNG", transparency=bytes(range(0, 180, 20))),
    "palette gif": lambda: encoded(palette(), "GIF"),
    "la": lambda: encoded(picture().convert("LA"), "PNG"),
    "rgba": lambda: encoded(picture().convert("RGBA"), "PNG"),
    "rgb with a transparent colour": lambda: encoded(picture(), "PNG", transparency=(1, 2, 3)),
    "bilevel": lambda: encoded(picture().convert("1"), "PNG"),
    "webp": lambda: encoded(picture(), "WEBP"),
    "webp lossless with alpha": lambda: encoded(picture().convert("RGBA"), "WEBP", lossless=True),
    "bmp": lambda: encoded(picture(), "BMP"),
    "tiff": lambda: encoded(picture(), "TIFF", compression="tiff_lzw"),
    "tiff cmyk": lambda: encoded(picture().convert("CMYK"), "TIFF"),
    "ppm": lambda: encoded(picture(), "PPM"),
    "jpeg 2000": lambda: encoded(picture(), "JPEG2000"),
    "tiff la": lambda: encoded(picture().convert("LA"), "TIFF"),
    "mpo": lambda: encoded(picture(), "MPO", save_all=True, append_images=[picture(seed=1)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_image_become_pils_rgb(kind):
    file = KINDS[kind]()
    pixels, _ = raw_pixels(file)
    np.testing.assert_array_equal(pixels, judged(file))


@pytest.mark.parametrize(("channels", "colour", "bound"), [(3, 2, 1), (1, 0, 0)], ids=["colour", "gray"])
def test_png_of_16_bits(channels, colour, bound):
    levels = np.random.default_rng(0).integers(0, 1 << 16, (5, 7, channels), dtype=np.uint16)
    pixels, _ = raw_pixels(png(7, 5, 16, colour, [row.astype(">u2").tobytes() for row in levels]))
    assert np.abs(pixels - (np.rint(levels / 257) if channels == 1 else levels / 257)).max() <= bound


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(kind, orientation):
    file = encoded(picture(), kind, exif=exif(orientation))
    pixels, _ = raw_pixels(file)
    np.testing.assert_array_equal(pixels, judged(file))
    assert pixels.shape[:2] == ((60, 44) if orientation > 4 else (44, 60))
    stored = encode(file, AUTO)
    assert (stored.data == file) == (kind == "JPEG" and orientation == 1)


@pytest.mark.parametrize(
    "damaged", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_loses_no_image(damaged):
    file = encoded(picture(), "JPEG", exif=b"Exif\0\0" + damaged)
    stored = encode(file, AUTO)
    judge = np.asarray(Image.open(io.BytesIO(file)))
    np.testing.assert_array_equal(raw_pixels(file)[0], judge)
    assert stored.data == file or {"exif_unreadable", "warned_of"} & set(stored.changes)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_give_their_first_frame(kind):
    frames = [picture(seed=seed) for seed in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels, changes = raw_pixels(file := encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert "first_frame" in changes
    if kind == "GIF":
        np.testing.assert_array_equal(pixels, judged(file))
    else:
        np.testing.assert_array_equal(pixels, np.asarray(frames[0]))


def test_a_name_says_nothing(tmp_path):
    """ImageNet holds a PNG and CMYK files that are named .JPEG; formats go by content."""
    path = tmp_path / "n02105855_2933.JPEG"
    picture().save(path, "PNG")
    pixels, _ = raw_pixels(path.read_bytes())
    np.testing.assert_array_equal(pixels, np.asarray(picture()))
    stored = encode(path.read_bytes(), AUTO)
    assert stored.mode == JPEG
    assert Image.open(io.BytesIO(stored.data)).format == "JPEG"


BOMBS = {
    "png": lambda: png(30_000, 30_000, 1, 0, [bytes(3750)]),
    "png beyond PIL's bound too": lambda: png(1 << 30, 1 << 30, 8, 2, [b""]),
    "png just above": lambda: png(MAX_PIXELS + 1, 1, 8, 0, [b""]),
    "bmp": lambda: encoded(picture(), "BMP")[:18] + struct.pack("<ii", 50_000, 50_000) + encoded(picture(), "BMP")[26:],
    "jpeg": lambda: resized_jpeg(65_000, 65_000),
    "gif": lambda: b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + encoded(picture(), "GIF")[10:],
    "ppm": lambda: b"P6 20000 20000 255\n",
}


def resized_jpeg(width, height):
    file = bytearray(encoded(picture(), "JPEG"))
    at = file.index(b"\xff\xc0")
    file[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(file)


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("encoding", [AUTO, RAW])
def test_decompression_bombs_are_refused_unread(bomb, encoding, monkeypatch):
    file = BOMBS[bomb]()
    monkeypatch.setattr(ImageFile.ImageFile, "load", Mock(side_effect=AssertionError("decoded")))
    refused(rf"\d+.* pixels.*at most {MAX_PIXELS}|at most {MAX_PIXELS} pixels", encode, file, encoding)


def test_bomb_of_a_decoded_array():
    refused(f"at most {MAX_PIXELS}", encode, np.broadcast_to(np.uint8(0), (10_000, 10_000)), AUTO)


# What the process has by then, and less than the chunk would take.
LITTLE_MEMORY = """
import resource, sys
import PIL.PngImagePlugin
from fastdeit.pipelines.conversion.encode import Encoding, encode
from fastdeit.pipelines.errors import UserError
have = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (have + (80 << 20),) * 2)
try:
    encode(open(sys.argv[1], "rb").read(), Encoding())
except (UserError, ValueError) as error:
    print("refused", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("chunk", ["iCCP", "zTXt", "iTXt"])
def test_png_metadata_bombs(chunk, tmp_path):
    info = PngImagePlugin.PngInfo()
    huge = zlib.compress(bytes(100 << 20), 9)
    if chunk == "iCCP":
        info.add(b"iCCP", b"profile\0\0" + huge)
    elif chunk == "zTXt":
        info.add(b"zTXt", b"Comment\0\0" + huge)
    else:
        info.add(b"iTXt", b"Comment\0\1\0\0\0" + huge)
    (tmp_path / "bomb.png").write_bytes(encoded(picture(), "PNG", pnginfo=info))
    run_python("-c", LITTLE_MEMORY, tmp_path / "bomb.png", timeout=60, status=0)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
@pytest.mark.parametrize("careless", [False, True])
def test_truncated_jpegs_are_errors(monkeypatch, options, careless):
    """At any length, and also where some library told PIL to put up with it."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", careless)
    file = encoded(picture(), "JPEG", **options)
    assert encode(file, AUTO).data == file
    for length in [*range(0, len(file), 37), len(file) - 2, len(file) - 1]:
        for encoding in (AUTO, RAW):
            with pytest.raises((UserError, OSError)):
                encode(file[:length], encoding)


@pytest.mark.parametrize("garbage", [b"\0", b"trailing", b"\xff\xd8\xff", b"\xff\xda" * 5000])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_garbage_behind_a_jpeg_is_harmless(garbage, options):
    file = encoded(picture(), "JPEG", **options) + garbage
    stored = encode(file, AUTO)
    assert (stored.data, stored.changes) == (file, ("passed_through",))


def scans(count):
    """A progressive JPEG whose last scan comes `count` times more."""
    file = encoded(picture(), "JPEG", progressive=True)
    last = file.rindex(b"\xff\xda")
    return file[:-2] + file[last:-2] * count + file[-2:]


def test_number_of_scans_is_bounded():
    ours = encoded(picture(), "JPEG", progressive=True).count(b"\xff\xda")
    most = scans(MAX_SCANS - ours)
    assert most.count(b"\xff\xda") == MAX_SCANS
    encode(most, AUTO)
    for count in (MAX_SCANS - ours + 1, 5000):
        for encoding in (AUTO, RAW):
            refused(f"more than {MAX_SCANS} scans", encode, scans(count), encoding)


def test_scans_in_a_thumbnail_do_not_count():
    file = encoded(picture(), "JPEG", exif=b"Exif\0\0" + b"\xff\xda\xff\xd9" * 500)
    assert encode(file, AUTO).data == file


@pytest.mark.parametrize(
    "file",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + bytes(100),
        b"\0\0\1\0\1\0" + bytes([16, 16, 0, 0, 1, 0, 32, 0]) + struct.pack("<II", 40, 22) + bytes(1200),
        b"/* XPM */\n",
        b"",
        b"GIF89a",
    ],
    ids=["eps", "psd", "ico", "xpm", "empty", "gif without more"],
)
def test_other_formats_are_refused(file):
    with pytest.raises((OSError, UserError, IndexError)):
        encode(file, AUTO)


def test_warnings_are_counted_and_stay_in():
    image = palette()
    file = encoded(image, "PNG", transparency=bytes(range(40)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = encode(file, RAW)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(file)).convert("RGB")
    assert ("warned_of" in stored.changes) == bool(seen)


@pytest.mark.parametrize(("mode", "side", "most"), [("raw", 65536, 65535), ("jpeg", 65501, 65500)])
def test_sides_that_no_format_stores(mode, side, most):
    """A bad image, to be left out by --on-error skip, not the end of the conversion."""
    with pytest.raises(UserError, match=rf"{side} x 1 pixels, .* go up to {most}: give --max-side"):
        encode(Image.new("RGB", (side, 1)), Encoding(mode=mode))
    assert encode(Image.new("RGB", (side, 1)), Encoding(mode=mode, max_side=500)).width == 500
