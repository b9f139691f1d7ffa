"""One image through a conversion: what is stored for it, judged by PIL on the same file."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.conversion.encode import CHANGES
from fastdeit.pipelines.conversion.workers import ConvertError
from fastdeit.pipelines.formats.beton import BetonDataset
from pictures import encoded, exif, picture
from tiny_datasets import Items

PHOTO = picture(0, (90, 60))


def convert_one(tmp_path, item, **options):
    """The stored image, decoded, the stored bytes, and what was done."""
    report = convert(Items([item]), tmp_path / "one.beton", progress=False, **options)
    with BetonDataset(tmp_path / "one.beton") as dataset:
        stored = dataset.read(0).tobytes()
        shape = (int(dataset.height[0]), int(dataset.width[0]), 3)
        if dataset.is_jpeg(0):
            image = Image.open(io.BytesIO(stored))
            assert image.mode in ("RGB", "L")
            pixels = np.asarray(image.convert("RGB"))
        else:
            pixels = np.frombuffer(stored, np.uint8).reshape(shape)
        assert pixels.shape == shape
    return pixels, stored, {change for change in CHANGES if report.counts[change]}


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": "4:4:4"}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_kinds_of_jpeg_that_pass(tmp_path, mode, options):
    file = encoded(PHOTO.convert(mode), "JPEG", **options)
    _, stored, done = convert_one(tmp_path, file)
    assert stored == file
    assert done == {"passed_through"}


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    file = encoded(PHOTO.convert("CMYK"), "JPEG", quality=95)
    pixels, _, done = convert_one(tmp_path, file, quality=100)
    assert done == {"reencoded", "mode_converted"}
    assert np.abs(pixels.astype(int) - np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))).mean() < 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    file = encoded(PHOTO, "JPEG", exif=exif(orientation), quality=95)
    pixels, stored, done = convert_one(tmp_path, file, quality=100)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    assert np.abs(pixels.astype(int) - np.asarray(upright)).mean() < 1
    assert done == ({"passed_through"} if orientation == 1 else {"reencoded", "rotated"})
    assert Image.open(io.BytesIO(stored)).getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGB", "CMYK", "YCbCr", "LAB"])
def test_every_8_bit_mode_becomes_pils_rgb(tmp_path, mode):
    image = (PHOTO.convert("L") if mode == "PA" else PHOTO).convert(mode)
    pixels, _, done = convert_one(tmp_path, encoded(image, "TIFF"), mode="raw")
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))
    assert done == {"stored_raw", *(() if mode == "RGB" else ("mode_converted",))}


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bit_gray_is_scaled(tmp_path, dtype):
    gray = np.asarray(PHOTO.convert("L"))
    wide = Image.fromarray(gray.astype(dtype) * 257)
    pixels, _, _ = convert_one(tmp_path, encoded(wide, "TIFF"), mode="raw")
    np.testing.assert_array_equal(pixels, np.repeat(gray[..., None], 3, axis=2))


@pytest.mark.parametrize("pixels", [np.full((4, 4), 70000, np.int32), np.full((4, 4), 0.5, np.float32)])
def test_unknown_ranges_are_refused(tmp_path, pixels):
    with pytest.raises(ConvertError, match="convert it to 8 bits first"):
        convert_one(tmp_path, encoded(Image.fromarray(pixels), "TIFF"))


@pytest.mark.parametrize("size", [(120, 50), (50, 120), (90, 90), (400, 1)])
def test_longer_side_is_reduced(tmp_path, size):
    image = picture(1, size)
    pixels, _, done = convert_one(tmp_path, encoded(image, "PNG"), max_side=60, mode="raw")
    expected = image.copy()
    expected.thumbnail((60, 60), Image.Resampling.LANCZOS, reducing_gap=None)
    assert pixels.shape == np.asarray(expected).shape
    np.testing.assert_array_equal(pixels, np.asarray(expected))
    assert done == {"stored_raw", "resized"}


def test_modes(tmp_path):
    file = encoded(picture(2, (90, 60)), "JPEG", quality=70)
    decoded = np.asarray(Image.open(io.BytesIO(file)))
    pixels, stored, done = convert_one(tmp_path, file, mode="jpeg", quality=98)
    assert stored != file
    assert done == {"reencoded"}
    assert np.abs(pixels.astype(int) - decoded).mean() < 1
    pixels, _, done = convert_one(tmp_path, file, mode="raw")
    np.testing.assert_array_equal(pixels, decoded)
    assert done == {"stored_raw"}
    for quality, halved in ((94, True), (95, False)):
        stored = convert_one(tmp_path, file, mode="jpeg", quality=quality)[1]
        horizontal = {layer[1] for layer in Image.open(io.BytesIO(stored)).layer}
        assert (horizontal == {1, 2}) is halved


def test_decoded_images_are_raw_where_small(tmp_path):
    for item, raw in (
        (np.asarray(picture(0, (64, 64))), True),
        (np.asarray(picture(0, (28, 28)).convert("L")), True),
        (picture(0, (32, 32)), True),
        (np.asarray(picture(0, (65, 20))), False),
    ):
        pixels, _, done = convert_one(tmp_path, item, quality=100)
        assert ("stored_raw" in done) is raw
        expected = np.asarray(Image.fromarray(np.asarray(item)).convert("RGB"))
        assert np.abs(pixels.astype(int) - expected).max() <= (0 if raw else 4)
