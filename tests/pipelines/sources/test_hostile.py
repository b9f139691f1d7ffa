"""Small files that unpack to gigabytes, fifos that never end, JSON without a floor; memory as the OS measures it."""

import gzip
import io
import os
import re
import struct
import zlib

import numpy as np
import pytest

from archives import jpeg, pack, refused
from fastdeit.pipelines.sources import SampleError, SourceError, open_source, read_class_names
from fastdeit.pipelines.sources.imagenet import real_labels
from system import make_odd, run_python

pyarrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

MB = 1 << 20
DEEP = b"[" * 400_000 + b"]" * 400_000


READ = """
import resource, sys
import pyarrow.parquet
from fastdeit.pipelines.sources import SampleError, SourceError, open_source, parquet

parquet.MAX_PAGE = int(sys.argv[2]) or parquet.MAX_PAGE
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
said = set()
try:
    source = open_source(sys.argv[1])
    for i in range(min(len(source), 12)):
        try:
            said.add(len(source.read(i)[0]))
        except SampleError as error:
            said.add(str(error).partition(": ")[2])
except SourceError as error:
    said.add(str(error))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print(*said, sep="\\n")
"""


def read(text, max_page=0):
    """What reading the first samples of a source gives, in a process of its own, and the memory it took, in MB."""
    done = run_python("-c", READ, text, max_page, check=True)
    memory, *said = done.stdout.splitlines()
    return said, int(memory) / 1024


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["once", "as what differs from the last"])
def test_values_of_gigabytes_stored_in_kilobytes(tmp_path, kind):
    """20 GB in a file of a kilobyte, 240 MB in one of twenty."""
    path = tmp_path / "a.parquet"
    if kind == "once":
        images = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000), pyarrow.array([bytes(20_000_000)]))
        options = {"dictionary_pagesize_limit": 1 << 30, "store_schema": False}
    else:
        images = [bytes(8_000_000)] * 30
        options = {"use_dictionary": False, "column_encoding": {"image": "DELTA_BYTE_ARRAY"}}
    table = pyarrow.table({"image": images, "label": [0] * len(images)})
    pq.write_table(table, path, compression="zstd", **options)
    assert path.stat().st_size < (2000 if kind == "once" else 20_000)
    said, memory = read(path)
    assert said == ["20000000" if kind == "once" else "8000000"]
    assert memory < (300 if kind == "once" else 160)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "max_page", "reason"),
    [
        (bytes(40_000_000), 0, "a page of N bytes announces N, more than images and labels unpack to"),
        (np.random.default_rng(0).bytes(3_000_000), 8_000_000, "a page announces N bytes, and up to N are read"),
    ],
    ids=["zeros", "noise"],
)
def test_pages_larger_than_they_may_be(tmp_path, value, max_page, reason):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"image": [value] * 4, "label": [0] * 4})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    said, memory = read(path, max_page)
    assert [re.sub(r"\d{4,}", "N", text) for text in said] == [
        f"row group 0 is damaged ({reason}). Fetch the file again"
    ]
    assert memory < 32


def test_images_larger_than_they_may_be(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(pyarrow.table({"image": [bytes(1001), bytes(1000)], "label": [0, 1]}), path)
    monkeypatch.setattr("fastdeit.pipelines.sources.parquet.MAX_FILE", 1000)
    source = open_source(path)
    with pytest.raises(
        SampleError, match=r"a\.parquet\[0\]: 1001 bytes, but an image may have at most 1000\. Remove it"
    ):
        source.read(0)
    assert source.read(1)[1] == 1


def test_more_rows_than_bytes(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"image": pyarrow.nulls(1_000_000, pyarrow.binary()), "label": [0] * 1_000_000})
    pq.write_table(table, path, compression="zstd")
    refused(r"a\.parquet: declares 1000000 rows in \d{3,5} bytes, fewer than a byte a row", path)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_the_largest_page_is_pyarrows(tmp_path, compression, version, dictionary):
    """PyArrow tells the sum over a chunk's pages with their headers; the large page is nearly all of it."""
    from fastdeit.pipelines.sources.parquet_pages import largest_page

    path = tmp_path / "a.parquet"
    values = [np.random.default_rng(i % 7).bytes(5000 + i) for i in range(50)]
    options = {"use_dictionary": dictionary, "data_page_version": version, "write_statistics": not dictionary}
    pq.write_table(pyarrow.table({"x": values}), path, compression=compression, data_page_size=1 << 30, **options)
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start = chunk.dictionary_page_offset if dictionary else chunk.data_page_offset
    with open(path, "rb") as file:
        page = largest_page(file.fileno(), start, chunk.total_compressed_size, chunk.num_values)
    assert 0 <= chunk.total_uncompressed_size - page < 12_000 * (not dictionary) + 300
    assert page >= sum(map(len, values))


def test_rows_come_in_any_order_from_many_pages(tmp_path):
    path = tmp_path / "a.parquet"
    values = [bytes([i % 251]) * (1 + i * 37 % 4000) for i in range(700)]
    table = pyarrow.table({"image": values, "label": list(range(700))})
    pq.write_table(table, path, row_group_size=300, data_page_size=4096, dictionary_pagesize_limit=20_000)
    source = open_source(path)
    rng = np.random.default_rng(0)
    for i in [*range(700), *rng.integers(0, 700, 60).tolist(), *range(699, 650, -1)]:
        assert source.read(i)[:2] == (values[i], i)


def fifo(path):
    os.mkfifo(path)
    return path


SOURCES = [
    ("x.tar", "{}"),
    ("x.tar", "webdataset:{}"),
    ("x.tar", "imagenetv2:{}"),
    ("x.parquet", "{}"),
    ("cifar-10-python.tar.gz", "cifar:{}:train"),
    ("ILSVRC2012_img_train.tar", "{}"),
    ("ILSVRC2012_img_train.tar", "imagenet:{}"),
    ("train-images-idx3-ubyte", "{}"),
    ("x", "{}"),
]


@pytest.mark.parametrize(("name", "form"), SOURCES)
@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_what_is_no_regular_file_is_no_source(tmp_path, monkeypatch, name, form, kind):
    monkeypatch.chdir(tmp_path)
    make_odd(tmp_path / name, kind)
    refused(rf"{name}: is a {kind}, not a regular file. Copy its content", form.format(name))


def test_fifos_within_and_beside_sources(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    pack(folder / "a.tar", {"0.jpg": jpeg(), "0.cls": b"0"})
    fifo(folder / "b.tar")
    for text in (folder, f"webdataset:{folder}/*.tar"):
        refused(r"b\.tar: is a fifo", text)
    val = tmp_path / "ILSVRC2012_img_val.tar"
    pack(val, {"ILSVRC2012_val_00000001.JPEG": jpeg()})
    for name in ("LOC_val_solution.csv", "ILSVRC2012_devkit_t12.tar.gz"):
        fifo(tmp_path / name)
        refused(f"{name}: is a fifo", val)
    idx = tmp_path / "t10k-images-idx3-ubyte"
    idx.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", 1, 1, 1) + b"x")
    fifo(tmp_path / "t10k-labels-idx1-ubyte")
    refused("t10k-labels-idx1-ubyte: is a fifo", idx)
    for read_file in (read_class_names, lambda path: real_labels(path, [])):
        with pytest.raises(SourceError, match="list: is a fifo"):
            read_file(fifo(tmp_path / "list"))
        (tmp_path / "list").unlink()
        with open(tmp_path / "list", "wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(SourceError, match="list: more than 8388608 bytes, too many for a list"):
            read_file(tmp_path / "list")
        (tmp_path / "list").unlink()


def test_json_without_a_floor(tmp_path):
    label = b'{"label": ' + b"[" * 500 + b"]" * 500 + b"}"
    numbers = b'{"label": 1' + b"0" * 4000 + b"}"
    files = {}
    for i, data in enumerate((DEEP, b'{"a":' * 100_000, label, numbers, b'{"label": NaN}', b'{"label": true}')):
        files |= {f"{i}.jpg": jpeg(), f"{i}.json": data}
    source = open_source(pack(tmp_path / "a.tar", files))
    for i, reason in enumerate(
        (
            r"its \.json cannot be read \(about 400000 values",
            r"its \.json cannot be read \(nested more than 64 deep\)",
            r"its \.json cannot be read \(nested more than 64 deep\)",
            r"its \.json cannot be read \(an integer of 4001 digits",
            r"'label' of its \.json is nan",
            r"'label' of its \.json is True",
        )
    ):
        with pytest.raises(SampleError, match=rf"a\.tar:{i}\.jpg: {reason}.* Mend the label"):
            source.read(i)
    (tmp_path / "real.json").write_bytes(DEEP)
    with pytest.raises(SourceError, match=r"real\.json: not JSON"):
        real_labels(tmp_path / "real.json", [])
    table = pyarrow.table({"image": [jpeg()], "label": [0]}).replace_schema_metadata({"huggingface": DEEP})
    pq.write_table(table, tmp_path / "a.parquet")
    assert open_source(tmp_path / "a.parquet").class_names is None


def test_a_gzipped_array_of_gigabytes(tmp_path):
    for name, shape in (("train-images-idx3-ubyte.gz", (2000, 1000, 1000)), ("train-labels-idx1-ubyte.gz", (2000,))):
        with gzip.open(tmp_path / name, "wb") as file:
            file.write(bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape))
    refused(
        r"announces 2000000000 bytes, and up to 671\d{5} are read, or more once it is gunz",
        tmp_path / "train-images-idx3-ubyte.gz",
    )


@pytest.mark.slow
def test_a_matlab_file_that_unpacks_to_more(tmp_path):
    """As SciPy writes it, with one element more: a zlib stream of zeros in the place of a variable."""
    scipy_io = pytest.importorskip("scipy.io")
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    synsets = np.array([(i + 1, f"n{i:08d}", 0) for i in range(3)], fields)
    folder = "ILSVRC2012_devkit_t12/data"

    def devkit(bomb):
        file = io.BytesIO()
        scipy_io.savemat(file, {"synsets": synsets}, do_compression=True)
        packer = zlib.compressobj(9)
        stream = b"".join(packer.compress(bytes(MB)) for _ in range(bomb)) + packer.flush()
        mat = file.getvalue() + (struct.pack("<II", 15, len(stream)) + stream if bomb else b"")
        truth = f"{folder}/ILSVRC2012_validation_ground_truth.txt"
        pack(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", {f"{folder}/meta.mat": mat, truth: b"2\n"}, "w:gz")

    val = pack(tmp_path / "ILSVRC2012_img_val.tar", {"ILSVRC2012_val_00000001.JPEG": jpeg()})
    devkit(0)
    assert open_source(val).read(0)[1] == 1
    devkit(80)
    assert (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").stat().st_size < MB
    refused(r"meta\.mat: unpacks to more than 67108864 bytes", val)


def test_a_png_of_gigabytes_is_not_decoded(tmp_path):
    """Within a source, where the size is in the header of a sample."""
    from fastdeit.pipelines.conversion.convert import convert

    raw = zlib.compress(b"")

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    png = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", raw)
    )
    pack(tmp_path / "a.tar", {"0.png": png + chunk(b"IEND", b""), "0.cls": b"0", "1.jpg": jpeg(), "1.cls": b"0"})
    report = convert(tmp_path / "a.tar", tmp_path / "x", on_error="skip", progress=False)
    assert (report.num_samples, len(report.rejects)) == (1, 1)
