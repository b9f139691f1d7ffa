"""Files that a stranger made to exhaust memory or the parser end a command in one sentence.

Judge: the memory that the operating system counts for a process of the command's own.
"""

import binascii
import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from functools import partial

import numpy as np
import pytest

from archives import jpeg, pack, packed
from fastdeit.cli import run
from fastdeit.commands import convert, train
from fastdeit.model import kernel_table
from fastdeit.pipelines.formats.dataset import open_dataset
from fastdeit.teacher.label_cache import LabelCache
from hostile import command, forked
from pictures import picture
from run_logs import open_log
from tiny_datasets import image_folder, reseal, stored, write

MB = 1 << 20
MOST = 300  # MB beyond what the process had before
LISTS = b"[" + b"[]," * (6 * MB) + b"[]]"  # 19 MB, which parse to 450
DEEP = b"[" * 900 + b"]" * 900  # Python parses it, and fails when it prints it from deep within a call
NESTED = b"[" * 50_000


def bomb(head):
    """`head` and 400 MB of zeros, gzipped: of many parts, as `gzip` may write it."""
    return gzip.compress(head) + 400 * gzip.compress(bytes(MB))


def tar_header(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def of_a_folder(make):
    """`make(folder, ...)` as a function of the rest that returns a case: a function of the folder."""
    return lambda *given, **named: lambda folder: make(folder, *given, **named)


@of_a_folder
def recipe(folder, name, data):
    (folder / name).write_bytes(data)
    return command(train.main, "deit_tiny", "--config", folder / name)


def converted(folder, name, data, *words, form="{}"):
    """The command that converts a file."""
    (folder / name).write_bytes(data)
    return command(convert.main, form.format(folder / name), folder / "x.beton", *words)


def dataset(folder):
    write(folder / "x.beton", [stored(picture(i, (20, 20))) for i in range(3)]).close()
    return folder / "x.beton.json"


@of_a_folder
def sidecar(folder, data):
    dataset(folder).write_bytes(data)
    return lambda: run(lambda: open_dataset(folder / "x.beton"))


@of_a_folder
def resealed(folder, **changes):
    reseal(dataset(folder), **changes)
    return lambda: run(lambda: open_dataset(folder / "x.beton"))


def options_of_a_sidecar(folder):
    options = {"mode": "auto", "quality": [1], "max_side": "x", "shuffle_seed": "x", "limit": "y", "pillow": 3}
    reseal(dataset(folder), options=options, rejected=["x"])
    source = image_folder(folder / "images", [jpeg()], 1)
    return command(convert.main, "--verify", folder / "x.beton", "--against", source)


@of_a_folder
def labels(folder, data):
    (folder / "labels.json").write_bytes(data)
    return lambda: run(lambda: LabelCache(folder))


def soft_labels(folder, data):
    """Labels whose file the index vouches for."""
    (folder / "e.npz").write_bytes(data)
    epochs = {"0": {"file": "e.npz", "sha256": hashlib.sha256(data).hexdigest()}}
    described = {"key": {}, "teacher": "0", "teacher_name": "x", "class_names": None, "num_classes": 9, "topk": 3}
    index = {"format": "fastdeit-labels", "version": 1, "epochs": epochs, **described}
    (folder / "labels.json").write_text(json.dumps(index))
    return lambda: run(lambda: LabelCache(folder).logits(0, np.arange(1)))


def labels_deflated(folder):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("index", "logits"):
            np.lib.format.write_array(file := io.BytesIO(), np.zeros((160 * MB, 1), np.uint8), version=(1, 0))
            archive.writestr(f"{name}.npy", file.getbuffer())
    return soft_labels(folder, out.getvalue())


def labels_of_many_files(folder):
    """A .npz that is nothing but a directory, in which one file stands 60,000 times."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("x", "")
    data = out.getvalue()
    at, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    count, entry = 60_000, data[at:end]
    last = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, count * len(entry), at, 0)
    return soft_labels(folder, data[:at] + count * entry + last)


def val_of_imagenet(folder):
    return pack(folder / "ILSVRC2012_img_val.tar", {"ILSVRC2012_val_00000001.JPEG": jpeg()})


def real_labels(folder):
    (folder / "truth.txt").write_text("n01440764\n")
    (folder / "real.json").write_bytes(LISTS)
    source = f"imagenet:{val_of_imagenet(folder)}#labels={folder}/truth.txt"
    return command(convert.main, source, folder / "x.beton", "--real-labels", folder / "real.json")


@of_a_folder
def classes(folder, data):
    source = image_folder(folder / "images", [jpeg()], 1)
    (folder / "names.txt").write_bytes(data)
    return command(convert.main, source, folder / "x.beton", "--class-names", folder / "names.txt")


def kaggle(folder):
    (folder / "LOC_val_solution.csv").write_bytes(b"ImageId,PredictionString\n" + b"a,b\n" * (8 * MB))
    return command(convert.main, val_of_imagenet(folder), folder / "x.beton")


def imagenet_v2(folder):
    return converted(folder, "imagenetv2-x.tar.gz", bomb(tar_header("0/a.jpeg", 400 * MB)))


def devkit(folder):
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(bomb(tar_header("a", 400 * MB)))
    return command(convert.main, val_of_imagenet(folder), folder / "x.beton")


def matlab_variables(folder):
    """Each unpacks to less than the bound."""
    savemat = pytest.importorskip("scipy.io").savemat
    out = io.BytesIO()
    savemat(out, {"a": np.zeros(40 * MB, np.uint8)}, do_compression=True)
    data = out.getvalue()
    files = {"meta.mat": data + 10 * data[128:], "ILSVRC2012_validation_ground_truth.txt": b"1\n"}
    in_folder = {f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in files.items()}
    pack(folder / "ILSVRC2012_devkit_t12.tar.gz", in_folder, "w:gz")
    return command(convert.main, val_of_imagenet(folder), folder / "x.beton")


def cifar_archive(folder):
    return converted(folder, "cifar-10-python.tar.gz", bomb(tar_header("a", 400 * MB)), form="cifar:{}:train")


@of_a_folder
def cifar(folder, batch):
    path = folder / "cifar-10-python.tar"
    pack(path, {"c/batches.meta": pickle.dumps({"label_names": ["a"]}, 2), "c/test_batch": batch})
    return command(convert.main, f"cifar:{path}:test", folder / "x.beton")


def text(data):
    return b"X" + struct.pack("<I", len(data)) + data


def encoded_many_times():
    """A text of 30 MB, and 60 calls that make bytes of it."""
    calls = b"".join(b"K%cc_codecs\nencode\nh\x01%b\x86Rs" % (i, text(b"latin1")) for i in range(60))
    return b"\x80\x02}q\x00" + text(b"a" * 30 * MB) + b"q\x010" + calls + b"."


def wide_text():
    return b"\x80\x02}K\x01" + text("🦊".encode() + b"a" * 120 * MB) + b"s."


def lists_in_lists():
    """A label that prints as 10 GB."""
    label = ["a" * 20]
    for _ in range(8):
        label = [label] * 15
    return pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [label]}, 2)


def idx(folder):
    images = bytes([0, 0, 8, 3]) + struct.pack(">3I", 400, 1024, 1024)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(bomb(images))
    (folder / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + struct.pack(">I", 400) + bytes(400))
    return command(convert.main, folder / "train-images-idx3-ubyte.gz", folder / "x.beton")


def parquet_page(folder):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"image": [bytes(320 * MB)], "label": [0]})
    parquet.write_table(table, folder / "a.parquet", compression="zstd", use_dictionary=False, write_statistics=False)
    return command(convert.main, folder / "a.parquet", folder / "x.beton")


def varint(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def thrift_list(*items, times=1):
    return b"\xfc" + varint(len(items) * times) + b"".join(items) * times


def parquet_footer(schema, groups):
    """A parquet file without data; format: https://github.com/apache/parquet-format."""
    footer = b"\x15\x02\x19" + schema + b"\x16\x02\x19" + groups + b"\0"
    return b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1"


ROOT, INT = b"\x48\x01s\x15\x02\0", b"\x15\x04\x25\0\x18\x01x\0"  # the root of one child, and a column of integers
COLUMN = b"\x26\0\0"
FOOTERS = {
    "groups": (thrift_list(ROOT, INT), thrift_list(b"\x19" + thrift_list(COLUMN) + b"\x16\0\x16\2\0", times=300_000)),
    "columns": (thrift_list(ROOT, INT), thrift_list(b"\x19" + thrift_list(COLUMN, times=600_000) + b"\x16\0\x16\2\0")),
    "column": (thrift_list(ROOT, INT), thrift_list(b"\x19" + thrift_list(COLUMN, COLUMN) + b"\x16\0\x16\2\0")),
    "schema": (thrift_list(b"\x48\x01s\x15" + varint(800_000) + b"\0", *[INT] * 400_000), thrift_list(times=0)),
}  # fmt: skip


@of_a_folder
def footer(folder, kind):
    pytest.importorskip("pyarrow.parquet")
    return converted(folder, "a.parquet", parquet_footer(*FOOTERS[kind]))


def long_name(folder):
    return converted(folder, "a.tar", packed({"a" * 200_000 + ".jpg": jpeg()}))


def label_of_lists(folder):
    files = {"0.jpg": jpeg(), "0.json": b'{"label": [' + b"[]," * 340_000 + b"[]]}"}
    return converted(folder, "a.tar", packed(files))


@of_a_folder
def journal(folder, *values):
    with open(folder / "x.beton.journal", "wb") as file:
        for value in ({"journal": 1}, *values):
            line = value if isinstance(value, bytes) else json.dumps(value).encode()
            file.write(b"%08x %b\n" % (binascii.crc32(line), line))
    return command(convert.main, image_folder(folder / "images", [jpeg()], 1), folder / "x.beton")


def torn_journal(folder):
    """A line of a gigabyte, nearly all of it a hole; a torn line ends a journal."""
    with open(folder / "x.beton.journal", "wb") as file:
        file.write(b'00000000 {"journal":')
        file.truncate(1 << 30)
    return command(convert.main, image_folder(folder / "images", [jpeg()], 1), folder / "x.beton", "--resume")


def tiled_tiff(folder):
    """An image of 64 x 64 pixels in one tile of 400 MB. Format: TIFF 6.0, sections 2 and 15."""
    side = 20_480
    packer = zlib.compressobj()
    head = packer.compress(bytes(MB)) + packer.flush(zlib.Z_FULL_FLUSH)  # a block that needs none of those before it
    zeros = head + head[2:] * (side * side // MB - 1) + b"\3\0" + struct.pack(">I", zlib.adler32(bytes(side * side)))
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(zeros)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    tiff = b"II*\0" + struct.pack("<I", 8 + len(zeros)) + zeros + struct.pack("<H", len(tags)) + entries + bytes(4)
    return converted(folder, "a.tar", packed({"0.tif": tiff, "0.cls": b"0"}))


def log(folder):
    (folder / "log.jsonl").write_bytes(NESTED + b"\n")
    return partial(open_log(folder).go_back, 0, 0, evaluates=False)


@of_a_folder
def table_of_kernels(folder, data):
    (folder / "table.json").write_bytes(data)
    return lambda: run(lambda: kernel_table.read(folder / "table.json"))


def results(folder):
    from benchmarks import tables

    (folder / "soak.jsonl").write_bytes(NESTED + b"\n")
    return partial(tables.main, ["--results", str(folder)])


FILES = {
    "recipe, nested": (recipe("r.json", NESTED), "r.json is not valid JSON (nested more than 64 deep): correct it"),
    "recipe, large": (recipe("r.json", LISTS), "r.json is not valid JSON (18874372 bytes, above the limit"),
    "recipe, number": (recipe("r.json", b"[%s]" % (b"9" * 5000)), "r.json is not valid JSON (an integer of 5000"),
    "recipe, TOML": (recipe("r.toml", b"a = " + NESTED), "r.toml is not valid TOML (nested more than 64 deep)"),
    "recipe, dots": (recipe("r.toml", b"a" + b".a" * 30_000 + b" = 1"), "r.toml is not valid TOML (line 1 has more"),
    "recipe, hex": (recipe("r.toml", b"[run]\nepochs = 0x" + b"f" * 5000), "r.toml is not valid TOML (line 2 has a"),
    "sidecar, lists": (sidecar(LISTS), "x.beton.json: damaged (18874372 bytes, above the limit"),
    "sidecar, values": (sidecar(LISTS[: 15 * MB]), "x.beton.json: damaged (about 10485760 values, above the limit"),
    "sidecar, wide": (sidecar('"🦊{}"'.format("a" * 16_000_000).encode()), "x.beton.json: not a fastdeit-beton"),
    "sidecar, nested": (sidecar(DEEP), "x.beton.json: damaged (nested more than 64 deep). Convert"),
    "sidecar, ReaL": (resealed(real_labels=[[1] * 200_000, [1], [1]]), "x.beton.json: its real_labels are not 3"),
    "sidecar, huge ReaL": (resealed(real_labels=[[10**50], [1], [1]]), "x.beton.json: its real_labels are not 3"),
    "sidecar, options": (options_of_a_sidecar, "x.beton: does not say how it was converted"),
    "labels, values": (labels(LISTS[: 15 * MB]), "labels.json: damaged (ValueError('about 10485760 values"),
    "labels, nested": (labels(DEEP), "labels.json: damaged (ValueError('nested more than 64 deep')): make it again"),
    "labels, deflated": (labels_deflated, "e.npz: not soft labels (its index is compressed): remove it"),
    "labels, directory": (labels_of_many_files, "e.npz: not soft labels (its directory takes more than 1048576 bytes)"),
    "real.json": (real_labels, "real.json: more than 8388608 bytes, too many for a list. Is it the right file?"),
    "names, long": (classes(b"ab\n" * (4 * MB)), "names.txt: more than 8388608 bytes"),
    "names, lines": (classes(b"a\n" * (2 * MB)), "names.txt: 2097152 lines, but at most 1048576 classes"),
    "kaggle": (kaggle, "LOC_val_solution.csv: more than 8388608 bytes"),
    "imagenet v2": (imagenet_v2, "imagenetv2-x.tar.gz: holds more than"),
    "devkit": (devkit, "ILSVRC2012_devkit_t12.tar.gz: holds more than 67108864 bytes"),
    "devkit, variables": (matlab_variables, "meta.mat: unpacks to more than 67108864 bytes. Fetch it again"),
    "cifar": (cifar_archive, "cifar-10-python.tar.gz: holds more than"),
    "cifar, encoded": (cifar(encoded_many_times()), "test_batch: holds no 'data' and 'labels'"),
    "cifar, wide": (cifar(wide_text()), "test_batch: not read as a pickle (UnpicklingError: a text of 125829124 bytes"),
    "cifar, label": (cifar(lists_in_lists()), "test_batch[0], sample 0: cannot be converted: its label is a list"),
    "idx": (idx, "train-images-idx3-ubyte.gz: truncated or damaged (its header announces 419430400 bytes"),
    "parquet, page": (parquet_page, "a.parquet[0], sample 0: cannot be converted: row group 0 is damaged (a page of"),
    "parquet, groups": (footer("groups"), "a.parquet: not a parquet file of images, or a damaged one (more"),
    "parquet, columns": (footer("columns"), "a.parquet: not a parquet file of images, or a damaged one (more"),
    "parquet, column": (footer("column"), "its row group 0 does not have the 1 columns of the schema"),
    "parquet, schema": (footer("schema"), "a.parquet: not a parquet file of images, or a damaged one (more"),
    "TIFF": (tiled_tiff, "a.tar:0.tif, sample 0: cannot be converted: 64 x 64 pixels in tiles of 20480 x 20480"),
    "tar, name": (long_name, "a.tar, byte 200704: a name of 200004 characters, but at most 4096 are allowed"),
    "webdataset": (label_of_lists, "a.tar:0.jpg, sample 0: cannot be converted: its .json cannot be read (about"),
    "journal, entry": (journal([[1, 2]]), "x.beton.journal: holds a line that no conversion wrote (a sample whose"),
    "journal, types": (journal([["x"] * 7]), "x.beton.journal: holds a line that no conversion wrote (a sample whose"),
    "journal, nested": (journal(DEEP), ".journal: holds a line that no conversion wrote (nested more than 64 deep)"),
    "kernels, nested": (table_of_kernels(NESTED), "table.json is not a table of kernels (ValueError: nested more"),
    "kernels, lists": (table_of_kernels(LISTS), "table.json is not a table of kernels (ValueError: 18874372 bytes"),
    "results": (results, "soak.jsonl, line 1 is not JSON (nested more than 64 deep): remove it"),
}  # fmt: skip


SLOW = {
    "parquet, page",
    "labels, deflated",
    "devkit",
    "devkit, variables",
    "imagenet v2",
    "cifar",
    "cifar, wide",
    "idx",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in FILES])
def test_a_hostile_file_is_refused(tmp_path, name):
    make, reason = FILES[name]
    status, said, memory = forked(make(tmp_path))
    assert reason in said
    assert len(said.splitlines()) == 1, said
    assert len(said) < 1000
    assert status == 2
    assert memory < MOST


@pytest.mark.parametrize("case", [torn_journal, log])
def test_a_damaged_line_is_passed_over(tmp_path, case):
    """A journal ends with it, and the log of a run keeps it: neither is a reason to stop."""
    status, said, memory = forked(case(tmp_path))
    assert status == 0, said
    assert memory < MOST
