"""The beton format, judged by plain FFCV: it reads what we write and we read what it writes."""

import hashlib
import io
import json
import os
import pickle
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from PIL import Image

import refusals
import tiny_datasets
from fastdeit.pipelines.formats.beton import BetonDataset
from fastdeit.pipelines.formats.beton_layout import JPEG, MIN_PAGE, RAW, BetonError, sidecar_path
from fastdeit.pipelines.formats.beton_writer import BetonWriter
from fastdeit.pipelines.formats.sidecar import SidecarError
from fastdeit.pipelines.formats.writer import Record
from forked import run_code, succeed
from pictures import jpeg, picture

refused = partial(refusals.refused, error=BetonError)


def write(path, images, labels, mode=JPEG):
    tiny_datasets.write(path, [tiny_datasets.stored(image, mode) for image in images], labels).close()
    return path


@pytest.fixture
def small(tmp_path):
    return write(tmp_path / "small.beton", [picture(i) for i in range(6)], [3, 1, 0, 2, 1, 3])


# In a process of its own: FFCV's loader makes numba's type of byte arrays read-only for the whole process, and what
# numba compiles after that may fail.
PLAIN_FFCV = """
import json, sys
import numpy as np
from ffcv.fields import rgb_image
from ffcv.fields.basics import IntDecoder
from ffcv.loader import Loader, OrderOption

for path, out, os_cache, decoder, arguments in json.loads(sys.argv[1]):
    image = [getattr(rgb_image, decoder)(*arguments)]
    loader = Loader(path, batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, os_cache=os_cache,
                    pipelines={"image": image, "label": [IntDecoder()]})
    batches = [(np.array(pixels), np.array(label).ravel()) for pixels, label in loader]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*batches))
    np.savez(out, pixels=pixels, labels=labels)
"""


def plain_ffcv(*jobs):
    """Pixels and labels of each job: path, where to, os_cache, decoder, its arguments."""
    pytest.importorskip("ffcv")
    jobs = [[str(path), str(out), *rest] for path, out, *rest in jobs]
    succeed(run_code, PLAIN_FFCV, [json.dumps(jobs)])
    return [(found["pixels"], found["labels"].tolist()) for found in (np.load(out) for _, out, *_ in jobs)]


@pytest.fixture
def ffcv():
    return pytest.importorskip("ffcv")


@pytest.mark.slow
def test_ffcv_loads_what_we_write(tmp_path):
    """JPEGs, pixels, and crops of images of many sizes; in one process, since importing FFCV takes 8 seconds."""
    # Gray JPEGs are passed through by the conversion; libjpeg must make them RGB.
    gray = [picture(i, (320, 240), "L" if i % 4 == 3 else "RGB") for i in range(24)]
    colour = [picture(i, (320, 240)) for i in range(24)]
    labels = [int(v) for v in np.random.default_rng(1).integers(0, 1000, 24)]
    jpegs, raw = (write(tmp_path / f"{m}.beton", i, labels, mode=m) for i, m in ((gray, JPEG), (colour, RAW)))
    assert len(set(BetonDataset(raw).offset // MIN_PAGE)) == 3  # 24 x 230,400 bytes do not fit two pages
    plain = [Image.new("RGB", (60 + 7 * i, 90 - 5 * i), (20 * i, 255 - 20 * i, 100)) for i in range(8)]
    sizes = write(tmp_path / "sizes.beton", plain, list(range(8)))
    found = plain_ffcv(
        *((path, f"{path}-{os_cache}.npz", os_cache, "SimpleRGBImageDecoder", [])
          for path in (jpegs, raw) for os_cache in (True, False)),
        (sizes, f"{sizes}.npz", True, "CenterCropRGBImageDecoder", [[32, 32], 0.875]),
    )  # fmt: skip
    for images, (seen, seen_labels) in zip((gray, gray, colour, colour), found[:4], strict=True):
        assert seen_labels == labels
        for image, pixels in zip(images, seen, strict=True):
            stored = image if images is colour else Image.open(io.BytesIO(jpeg(image))).convert("RGB")
            difference = np.abs(pixels.astype(int) - np.asarray(stored))
            # FFCV asks libjpeg for its fast DCT, PIL for the exact one: measured 4 levels at most, 1.0 on average.
            assert difference.max() <= (0 if images is colour else 5)
            assert difference.mean() <= 1.5
    for image, crop in zip(plain, found[4][0], strict=True):
        assert np.abs(crop.astype(int) - image.getpixel((0, 0))).max() <= 2


@pytest.mark.slow
def test_ffcv_reader_sees_the_same_tables(ffcv, small):
    from ffcv.reader import Reader

    reader, ours = Reader(str(small)), BetonDataset(small)
    assert reader.field_names == ["image", "label"]
    assert [type(h).__name__ for h in reader.handlers.values()] == ["RGBImageField", "IntField"]
    assert reader.num_samples == len(ours) == 6
    image, label = (reader.metadata[name] for name in reader.metadata.dtype.names)
    np.testing.assert_array_equal(image["height"], ours.height)
    np.testing.assert_array_equal(image["width"], ours.width)
    np.testing.assert_array_equal(image["data_ptr"], ours.offset)
    np.testing.assert_array_equal(label, ours.label)
    np.testing.assert_array_equal(reader.alloc_table["size"], ours.size)


@pytest.mark.slow
def test_we_read_what_ffcv_writes(ffcv, tmp_path):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import encode_jpeg
    from ffcv.writer import DatasetWriter

    # Up to 3 MB a raw image, so that the file has several pages; those above 2 MB are compressed.
    samples = [(picture(i, (1024 - 100 * i, 1000)), (7 * i) % 5) for i in range(5)]
    path = tmp_path / "ffcv.beton"
    fields = {
        "image": RGBImageField(write_mode="smart", smart_threshold=2_000_000, jpeg_quality=95),
        "label": IntField(),
    }
    DatasetWriter(str(path), fields, page_size=2 * MIN_PAGE, num_workers=2).from_indexed_dataset(samples, chunksize=1)
    with BetonDataset(path) as dataset:
        assert (dataset.class_names, dataset.content_hash, dataset.num_classes) == (None, None, 5)
        assert dataset.label.tolist() == [label for _, label in samples]
        for i, (image, _) in enumerate(samples):
            assert (dataset.width[i], dataset.height[i]) == image.size
            expected = encode_jpeg(np.asarray(image), 95) if dataset.is_jpeg(i) else np.asarray(image)
            np.testing.assert_array_equal(dataset.read(i), expected.ravel())
        assert {dataset.is_jpeg(i) for i in range(5)} == {True, False}
        assert dataset.check() == []


def test_attributes_views_and_sidecar(small):
    dataset = BetonDataset(str(small))
    assert dataset.path == small
    assert dataset.class_names == ["class 0", "class 1", "class 2", "class 3"]
    assert dataset.num_classes == 4
    assert [dataset.height.dtype, dataset.width.dtype, dataset.label.dtype] == [np.int32, np.int32, np.int64]
    digest = hashlib.sha256()
    for i in range(6):
        stored = dataset.read(i)
        assert stored.tobytes() == jpeg(picture(i))
        assert not stored.flags.writeable
        assert stored.dtype == np.uint8
        digest.update(struct.pack("<3q", 40, 48, dataset.label[i]) + stored.tobytes())
    assert dataset.content_hash == "sha256:" + digest.hexdigest()
    for index in (-1, 6):
        refused(f"no sample {index}", dataset.read, index, error=IndexError)


def test_views_outlive_closing_and_copies_reopen(small):
    dataset = BetonDataset(small)
    view = dataset.read(2)
    copy = pickle.loads(pickle.dumps(dataset))
    dataset.close()
    assert view.tobytes() == copy.read(2).tobytes() == jpeg(picture(2))
    refused("closed", dataset.read, 2, error=ValueError)


def test_threads_share_a_dataset(small):
    with BetonDataset(small) as dataset, ThreadPoolExecutor(4) as pool:
        reads = list(pool.map(lambda i: dataset.read(i % 6).tobytes(), range(600)))
    assert all(data == jpeg(picture(i % 6)) for i, data in enumerate(reads[:12]))
    assert len(set(reads)) == 6


@pytest.mark.slow
def test_a_large_image_enlarges_the_pages(ffcv, tmp_path):
    from ffcv.reader import Reader

    sizes = [(900, 700), (1100, 1000), (40, 30), (1800, 1000), (60, 50)]  # up to 5.4 MB in pages of 2 MiB
    images = [Image.new("RGB", size, (i, 2 * i, 3 * i)) for i, size in enumerate(sizes)]
    path = write(tmp_path / "large.beton", images, [0] * 5, mode=RAW)
    page = int(Reader(str(path)).page_size)
    assert page == 4 * MIN_PAGE
    with BetonDataset(path) as dataset:
        assert all(dataset.read(i).tobytes() == image.tobytes() for i, image in enumerate(images))


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ({"height": 70000}, "up to 65535"),
        ({"width": 0}, "up to 65535"),
        ({"data": b"123"}, "cannot be stored as 2 x 2 pixels"),
        ({"data": b""}, "cannot be stored"),
        ({"label": -1}, "label -1 is negative"),
    ],
)
def test_writer_refuses_what_the_format_cannot_hold(tmp_path, sample, reason):
    good = {"data": bytes(12), "height": 2, "width": 2, "label": 0, "mode": RAW}
    with pytest.raises(BetonError, match=reason), BetonWriter(tmp_path / "x.beton", 1) as writer:
        writer.add(**{**good, **sample})
    assert not list(tmp_path.iterdir())


def test_writer_counts_samples(tmp_path):
    sample = {"data": bytes(3), "height": 1, "width": 1, "label": 0, "mode": RAW}
    with BetonWriter(tmp_path / "x.beton", 2) as writer:
        refused("no samples to write", writer.finish, class_names=["a"])
        for _ in range(2):
            writer.add(**sample)
        refused("more samples than the 2", writer.add, **sample)
    assert not list(tmp_path.iterdir())  # the block was left without finishing
    refused("page size", BetonWriter, tmp_path / "x.beton", 1, page_size=3 << 20)


@pytest.mark.slow
def test_fewer_samples_than_announced(ffcv, tmp_path):
    from ffcv.reader import Reader

    images = [picture(i) for i in range(4)]
    with BetonWriter(tmp_path / "x.beton", 7) as writer:
        for i, image in enumerate(images):
            writer.add(jpeg(image), height=40, width=48, label=i, mode=JPEG)
        writer.finish(class_names=["a", "b", "c", "d"])
    assert Reader(str(tmp_path / "x.beton")).num_samples == 4
    with BetonDataset(tmp_path / "x.beton") as dataset:
        assert [dataset.read(i).tobytes() for i in range(len(dataset))] == [jpeg(image) for image in images]
        assert dataset.check() == []


@pytest.mark.parametrize("done", range(7))
def test_an_interrupted_writer_is_taken_up(tmp_path, done):
    """Images of up to 5 MB in pages of 2 MiB, so that both gaps and larger pages are come upon again."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (h, 800, 3), np.uint8)) for h in (300, 700, 700, 30, 2000, 500)]
    whole = write(tmp_path / "whole.beton", images, [0] * 6, mode=RAW)

    def add(writer, image):
        writer.add(image.tobytes(), height=image.height, width=image.width, label=0, mode=RAW)

    path = tmp_path / "x.beton"
    with BetonWriter(path, 6, page_size=MIN_PAGE) as writer:
        writer.keep = True
        for i, image in enumerate(images[:done]):
            add(writer, image)
            if i == done // 2:
                writer.flush()
    records = [Record(i.height, i.width, 0, RAW, len(i.tobytes()), zlib.crc32(i.tobytes())) for i in images]
    with BetonWriter(path, 6, page_size=MIN_PAGE) as writer:
        assert writer.restore(records) == done
        for image in images[done:]:
            add(writer, image)
        writer.finish(class_names=["class 0"], source={}, options={}, counts={})
    assert path.read_bytes() == whole.read_bytes()
    assert sidecar_path(path).read_bytes() == sidecar_path(whole).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("damage", ["image", "gap", "cut"])
def test_what_is_damaged_is_not_taken_up(tmp_path, damage):
    image = Image.new("RGB", (800, 700), (1, 2, 3))  # one fits a page
    partial = tmp_path / "x.beton.partial"
    data = image.tobytes()
    with BetonWriter(tmp_path / "x.beton", 3, page_size=MIN_PAGE) as writer:
        writer.keep = True
        for _ in range(3):
            writer.add(data, height=700, width=800, label=0, mode=RAW)
    stored = bytearray(partial.read_bytes())
    at = {"image": MIN_PAGE * 2 + 7, "gap": MIN_PAGE * 2 - 1, "cut": MIN_PAGE * 2 + len(data) - 1}[damage]
    stored[at] ^= 1
    partial.write_bytes(stored[: at if damage == "cut" else None])
    with BetonWriter(tmp_path / "x.beton", 3, page_size=MIN_PAGE) as writer:
        writer.keep = True
        assert writer.restore([Record(700, 800, 0, RAW, len(data), zlib.crc32(data))] * 3) == 1
    assert partial.stat().st_size == MIN_PAGE + len(data)
    with BetonWriter(tmp_path / "x.beton", 3) as writer:
        assert writer.restore(()) == 0
    assert not list(tmp_path.iterdir())


def test_a_file_cut_short_under_its_reader(small):
    with BetonDataset(small) as dataset:
        os.truncate(small, int(dataset.offset[3]) + 5)
        assert dataset.read(2).tobytes() == jpeg(picture(2))
        refused(r"small\.beton, sample 3: the file was cut short .*: 5 of ", dataset.read, 3)
        refused(r"small\.beton, sample 5: the file was cut short .*: 0 of ", dataset.read, 5)
        assert "do not fit a file" in dataset.check()[0]


def test_a_file_that_was_replaced(small):
    with BetonDataset(small) as dataset:
        assert dataset.check() == []
        write(small, [picture(9)], [0])
        assert dataset.read(5).tobytes() == jpeg(picture(5))
        assert "replaced since" in dataset.check()[0]


# Offsets in the file, as FFCV's types.py lays it out: header of 24 bytes, two fields of 1041, records of 24.
RECORD = 24 + 2 * 1041


@pytest.mark.parametrize(
    ("at", "patch", "reason"),
    [
        (0, "<H", "version"),
        (2, "<H", "fields"),
        (4, "<I", "page size"),
        (8, "<Q", "do not fit a file"),
        (16, "<Q", "do not fit a file"),
        (24, "<B", "fields are not"),
        (RECORD + 24 * 2, "<B", "sample 2: its mode"),
        (RECORD + 24 * 2 + 5, "<Q", "sample 2: record and allocation table"),
        (RECORD + 24 * 4 + 16, "<q", "sample 4: its label is negative"),
        (RECORD + 24 * 4 + 16 + 5, "<H", "sample 4: its label is not below 1048576"),
        (-24 * 6, "<Q", "allocation table names sample"),
        (-24 * 3 + 8, "<Q", "sample 3: record and allocation table"),
        (-24 * 3 + 16, "<Q", "sample 3: its place is outside"),
    ],
)
def test_damaged_tables_are_named(small, at, patch, reason):
    data = bytearray(small.read_bytes())
    at %= len(data)
    for value in (2**64 - 1, 2**63 + 7, 2**40 + 9):
        width = struct.calcsize(patch)
        data[at : at + width] = (value % 2 ** (8 * width) if patch != "<q" else 2**64 - 1).to_bytes(width, "little")
        small.write_bytes(data)
        message = refused(reason, BetonDataset, small)
        assert str(small) in message


def test_an_image_that_announces_more_than_a_decoder_may_take_is_named(small):
    data = bytearray(small.read_bytes())
    data[RECORD + 24 + 1 : RECORD + 24 + 5] = b"\xff" * 4  # width and height
    small.write_bytes(data)
    refused(r"small\.beton, sample 1: it has more than 89478485 pixels", BetonDataset, small)


@pytest.mark.slow
def test_no_damaged_byte_of_the_tables_reads_outside(small):
    """Random damage either is refused or leaves every sample within the file."""
    good = small.read_bytes()
    sidecar_path(small).unlink()
    rng = np.random.default_rng(0)
    tables = [*range(24), *range(RECORD, RECORD + 6 * 24), *range(len(good) - 6 * 24, len(good))]
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        for at in rng.choice(tables, rng.integers(1, 4)):
            data[at] = rng.integers(256)
        small.write_bytes(data)
        try:
            with BetonDataset(small) as dataset:
                for i in range(len(dataset)):
                    stored = dataset.read(i).tobytes()
                    assert len(stored) == dataset.size[i] > 0
                    assert good.find(stored) >= RECORD + 6 * 24
        except BetonError:
            refused += 1
    assert 200 < refused < 400


@pytest.mark.parametrize("length", [0, 10, 24, RECORD, RECORD + 100, -24, -1])
def test_truncated_files_are_refused(small, length):
    small.write_bytes(small.read_bytes()[:length])
    refused(r"small\.beton: ", BetonDataset, small)


def test_sidecar_must_belong_to_its_file(small, tmp_path):
    sidecar = sidecar_path(small)
    text = sidecar.read_text()
    other = write(tmp_path / "other.beton", [picture(i) for i in range(6)], [3, 1, 0, 2, 1, 2])
    sidecar.write_text(sidecar_path(other).read_text())
    refused("describes a different data set", BetonDataset, small, error=SidecarError)
    for damaged, reason in (
        (text[: len(text) // 2], "damaged"),
        ("[]", "not a fastdeit-beton sidecar"),
        (text.replace('"version": 2', '"version": 1'), "not a fastdeit-beton sidecar of version 2"),
        (text.replace('"class 0"', '"class O"'), "was changed"),
    ):
        sidecar.write_text(damaged)
        refused(reason, BetonDataset, small, error=SidecarError)
