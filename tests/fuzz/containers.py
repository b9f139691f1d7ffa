"""Small containers of every kind that a conversion reads or writes, damage to them, and what else reads them."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from tests.fuzz.images import KINDS
from tests.helpers import archives
from tests.helpers.archives import packed
from tests.helpers.damage import BLOCK, edit_tar_header, mutate, tar_headers

Files = dict[str, bytes]
Samples = list[tuple[bytes, str]]  # a JPEG file, or RGB pixels; and its class


@dataclass(frozen=True)
class Container:
    """A source of a conversion.

    files   its files by name
    source  what `fastdeit-convert` is given, before the folder that they lie in is put in for {}
    damage  the files of them that are damaged
    read    what the standard library or the format's own package finds in such files, as far as it gets
    """

    files: Files
    source: str
    damage: tuple[str, ...]
    read: Callable[[Files], Iterator[tuple[bytes, str]]]
    options: tuple[str, ...] = ()


def _jpeg(number: int) -> bytes:
    return KINDS["jpeg"][1](number)


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The files that Python's tarfile finds, up to where it fails."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            while (member := archive.next()) is not None:
                file = archive.extractfile(member) if member.isreg() else None
                content = b"" if file is None else file.read()
                if file is not None and len(content) == member.size:
                    yield member.name, content
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError):
        return


def _imagenet_train() -> Container:
    name, archive = archives.imagenet_train(_jpeg)

    def read(files: Files) -> Iterator[tuple[bytes, str]]:
        for outer, data in _members(files[name]):
            for _, content in _members(data):
                yield content, outer.removesuffix(".tar")

    return Container({name: archive}, f"{{}}/{name}", (name,), read)


def _imagenet_val() -> Container:
    name, archive = archives.imagenet_val(_jpeg)
    labels = "imagenet_2012_validation_synset_labels.txt"
    files = {name: archive, labels: b"".join(b"n0000000%d\n" % (i % 3) for i in range(6))}

    def read(files: Files) -> Iterator[tuple[bytes, str]]:
        classes = files[labels].decode("latin-1").splitlines()
        for member, content in _members(files[name]):
            digits = member.removesuffix(".JPEG").rpartition("_")[2]
            if digits.isdigit() and 0 < int(digits) <= len(classes):
                yield content, classes[int(digits) - 1].strip()

    return Container(files, f"{{}}/{name}", (name, name, labels), read)


def _imagenet_v2(zipped: bool) -> Container:
    from timm.data import ImageNetInfo

    wnids = ImageNetInfo().label_names()
    name, archive = archives.imagenet_v2(_jpeg)
    name += ".gz" * zipped

    def read(files: Files) -> Iterator[tuple[bytes, str]]:
        data = files[name]
        try:
            data = gzip.decompress(data) if zipped else data
        except (OSError, EOFError, ValueError):
            return
        for member, content in _members(data):
            folder = member.rpartition("/")[0].rpartition("/")[2]
            if folder.isdigit() and int(folder) < len(wnids):
                yield content, wnids[int(folder)]

    return Container({name: gzip.compress(archive) if zipped else archive}, f"{{}}/{name}", (name,), read)


def _webdataset() -> Container:
    files = {}
    for shard in range(2):
        samples = ((f"{'folder' * 20}/{i}", _jpeg(4 * shard + i), i) for i in range(4))
        files[f"train-000{shard}.tar"] = packed(archives.labelled(samples))

    def read(files: Files) -> Iterator[tuple[bytes, str]]:
        for data in files.values():
            samples: dict[str, dict[str, bytes]] = {}
            for member, content in _members(data):
                folder, slash, last = member.rpartition("/")
                key, _, extension = last.partition(".")
                samples.setdefault(folder + slash + key, {})[extension.lower()] = content
            for parts in samples.values():
                try:
                    label = int(parts["cls"]) if "cls" in parts else int(json.loads(parts["json"])["label"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
                yield from ((content, str(label)) for name, content in parts.items() if name not in ("cls", "json"))

    return Container(files, "webdataset:{}/train-{{0000..0001}}.tar", tuple(files), read)


def _parquet(compression: str) -> Container:
    import pyarrow.parquet as pq

    name, table = archives.parquet(_jpeg, compression=compression)

    def read(files: Files) -> Iterator[tuple[bytes, str]]:
        try:
            parquet = pq.ParquetFile(io.BytesIO(files[name]))
            described = json.loads((parquet.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
            classes = described.get("info", {}).get("features", {}).get("label", {}).get("names")
        except Exception:  # damaged metadata makes PyArrow raise almost anything
            return
        for group in range(parquet.num_row_groups):
            try:
                rows = parquet.read_row_group(group).to_pylist()
            except Exception:
                continue
            for row in rows:
                label, image = row.get("label"), row.get("image") or {}
                if isinstance(label, int) and isinstance(image.get("bytes"), bytes):
                    named = isinstance(classes, list) and 0 <= label < len(classes)
                    yield image["bytes"], str(classes[label]) if named else str(label)

    return Container({name: table}, f"{{}}/{name}", (name,), read)


def _idx(zipped: bool) -> Container:
    names = [f"train-{what}-ubyte" + ".gz" * zipped for what in ("images-idx3", "labels-idx1")]
    rng = np.random.default_rng(0)
    images = b"\0\0\x08\x03" + np.array([9, 28, 28], ">u4").tobytes() + rng.bytes(9 * 784)
    labels = b"\0\0\x08\x01" + np.array([9], ">u4").tobytes() + bytes(range(9))
    files = {n: gzip.compress(data) if zipped else data for n, data in zip(names, (images, labels), strict=True)}

    def read(files: Files) -> Iterator[tuple[bytes, str]]:
        try:
            pixels, labels = (gzip.decompress(files[n]) if zipped else files[n] for n in names)
        except (OSError, EOFError, ValueError):
            return
        count, height, width = np.frombuffer(pixels[4:16].ljust(12, b"\0"), ">u4").tolist()
        for i in range(min(count, len(labels) - 8)):
            one = np.frombuffer(pixels[16 + i * height * width : 16 + (i + 1) * height * width], np.uint8)
            yield np.repeat(one, 3).tobytes(), str(labels[8 + i])

    return Container(files, f"{{}}/{names[0]}", tuple(names), read)


def _cifar(zipped: bool) -> Container:
    name = "cifar-10-binary.tar" + ".gz" * zipped
    rng = np.random.default_rng(0)
    batches = [b"".join(bytes([i % 10]) + rng.bytes(3072) for i in range(3)) for _ in range(6)]
    files = {f"cifar-10-batches-bin/data_batch_{i}.bin": batches[i] for i in range(1, 6)}
    files["cifar-10-batches-bin/test_batch.bin"] = batches[0]
    files["cifar-10-batches-bin/batches.meta.txt"] = b"".join(b"class%d\n" % i for i in range(10))
    archive = packed(files)

    def read(files: Files) -> Iterator[tuple[bytes, str]]:
        try:
            members = dict(_members(gzip.decompress(files[name]) if zipped else files[name]))
        except (OSError, EOFError, ValueError):
            return
        names = next((d for n, d in members.items() if n.endswith("meta.txt")), b"").decode("latin-1").split("\n")
        for member, data in members.items():
            for at in range(0, len(data) - 3072, 3073) if "data_batch" in member else ():
                if data[at] < len(names):
                    planes = np.frombuffer(data[at + 1 : at + 3073], np.uint8).reshape(3, 32, 32)
                    yield planes.transpose(1, 2, 0).tobytes(), names[data[at]].strip()

    return Container(
        {name: gzip.compress(archive) if zipped else archive}, f"{{}}/{name}", (name,), read, ("--split", "train")
    )


SOURCES: dict[str, Callable[[], Container]] = {
    "ilsvrc train tar": _imagenet_train,
    "ilsvrc val tar": _imagenet_val,
    "imagenet-v2 tar": lambda: _imagenet_v2(False),
    "imagenet-v2 tar.gz": lambda: _imagenet_v2(True),
    "webdataset shards": _webdataset,
    "parquet": lambda: _parquet("none"),
    "parquet snappy": lambda: _parquet("snappy"),
    "idx": lambda: _idx(False),
    "idx.gz": lambda: _idx(True),
    "cifar tar": lambda: _cifar(False),
    "cifar tar.gz": lambda: _cifar(True),
}
# What a conversion wrote: the format, the options, and the file that is damaged.
OUTPUTS: dict[str, tuple[str, str, str]] = {
    "beton": ("beton", "auto", "x.beton"),
    "beton of pixels": ("beton", "raw", "x.beton"),
    "beton without sidecar": ("beton", "auto", "x.beton"),
    "beton's sidecar": ("beton", "auto", "x.beton.json"),
    "shard": ("webdataset", "auto", "x/shard-000000.tar"),
    "shard of pixels": ("webdataset", "raw", "x/shard-000001.tar"),
    "shard's index": ("webdataset", "auto", "x/shard-000001.idx"),
    "shards' table": ("webdataset", "auto", "x/samples.npy"),
    "shards' sidecar": ("webdataset", "auto", "x/dataset.json"),
    "shards' nodes": ("webdataset", "auto", "x/nodes/node-000.txt"),
}


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """`data` damaged where it tells most, or anywhere: headers and tables, lengths, whole blocks, the end."""
    headers = tar_headers(data)
    if headers and rng.random() < 0.33:
        return edit_tar_header(data, rng)
    start = 0
    match int(rng.integers(4)):
        case 0:
            start = int(rng.choice(headers)) if headers else len(data) // 2
        case 1:
            start = max(0, len(data) - int(rng.choice([16, 64, 300, 1000])))
        case 2:
            # Where a beton file's fields end and its records begin, or a numpy table's header ends.
            start = min(2106 if len(data) > 4096 else 128, len(data) - 1)
    return data[:start] + mutate(data[start:], rng, BLOCK)
