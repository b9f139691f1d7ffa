"""The layout of tar shards, which the reader, the writer and the checks share; it depends on the samples alone.

A data set is a folder:

    shard-000000.tar  a ustar archive that plain DALI, the webdataset package and tar read
    shard-000000.idx  the shard's index for DALI, as its wds2idx writes it
    samples.npy       one record a sample, see `SAMPLE`
    dataset.json      the sidecar, see `sidecar`
    nodes/node-000.txt  the names of the shards of each node, a line each

In a shard every sample is two members, `000000000.jpg` and `000000000.cls`: a JPEG file and the label as decimal
text. RGB pixels are a `.ppm` instead, whose bytes are a short header and the pixels as they are.
"""

import re

import numpy as np

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.beton_layout import JPEG, RAW

TABLE, SIDECAR, NODES = "samples.npy", "dataset.json", "nodes"
KIND = "fastdeit-webdataset"
MAX_SAMPLES = 10**9  # keys have nine digits
MAX_SHARDS = 10**6  # and names of shards six
MAX_SIZE = 1 << 31  # bytes of a sample, as in a beton file
BLOCK = 512
END = bytes(2 * BLOCK)
KNOWN = re.compile(r"shard-\d{6}\.(tar|idx)|samples\.npy|dataset\.json")
KNOWN_NODES = re.compile(r"node-\d{3,}\.txt")

# offset: of the JPEG file or of the pixels, in bytes from the start of its shard
SAMPLE = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u8"),
        ("label", "<i8"),
        ("shard", "<u4"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("mode", "u1"),
    ]
)


class ShardError(UserError):
    """A folder of shards that cannot be read or written as asked."""


def shard_name(shard: int) -> str:
    return f"shard-{shard:06d}.tar"


def index_name(shard: int) -> str:
    return f"shard-{shard:06d}.idx"


def node_name(node: int) -> str:
    return f"node-{node:03d}.txt"


def node_list(node: int, nodes: int, shards: int) -> bytes:
    """The names of the shards of a node; nodes take shards in turn."""
    return "".join(f"{shard_name(shard)}\n" for shard in range(node, shards, nodes)).encode()


def before(index: int, *, size: int, height: int, width: int, mode: int) -> bytes:
    """The bytes right before those of sample `index`: its tar header, and the header of a PPM."""
    head = _ppm_header(height, width, mode)
    return _tar_header(_image_name(index, mode), len(head) + size) + head


def after(index: int, *, size: int, height: int, width: int, mode: int, label: int) -> bytes:
    """The bytes right after those of sample `index`: zeros up to a whole block, and the member with the label."""
    length = len(_ppm_header(height, width, mode)) + size
    text = b"%d" % label
    return bytes(-length % BLOCK) + _tar_header(f"{index:09d}.cls", len(text)) + text + bytes(BLOCK - len(text))


def index_file(first: int, samples: np.ndarray) -> bytes:
    """The index of a shard that holds `samples`, (N,) SAMPLE with offsets; `first` is the index of its first sample.

    Version 1.2 of DALI's wds2idx: extension, offset, size and name of every member, a line a sample.
    """
    lines = [f"v1.2 {len(samples)}\n"]
    for index, sample in enumerate(samples.tolist(), first):
        offset, size, label, _, height, width, mode = sample
        head = len(_ppm_header(height, width, mode))
        start, length = offset - head, head + size
        name, text = _image_name(index, mode), str(label)
        label_start = start + length + -length % BLOCK + BLOCK
        lines.append(f"{name[-3:]} {start} {length} {name} cls {label_start} {len(text)} {index:09d}.cls\n")
    return "".join(lines).encode()


def layout(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The offset of each sample, (N,) int64, and the length of every shard, (S,) int64, in bytes.

    The samples' shards must count up from 0 without a gap.
    """
    digits = np.searchsorted([10, 100, 1000, 10000], [samples["height"], samples["width"]], side="right") + 1
    head = np.where(samples["mode"] == RAW, digits.sum(0) + len("P6\n \n255\n"), 0)
    length = head + samples["size"].astype(np.int64)
    span = 3 * BLOCK + length + -length % BLOCK
    end = np.cumsum(span)
    first = np.flatnonzero(np.diff(samples["shard"].astype(np.int64), prepend=-1))
    start = end - span
    shard_start = start[first]
    offset = start - shard_start[samples["shard"]] + BLOCK + head
    return offset, np.diff(np.append(shard_start, end[-1])) + len(END)


def shard_count(capacity: int, shard_size: int, nodes: int) -> int:
    """The fewest shards of at most `shard_size` samples that hold `capacity` and are a multiple of `nodes`."""
    shards = -(-capacity // shard_size)
    return shards + -shards % nodes


def shard_sizes(capacity: int, shards: int) -> np.ndarray:
    """Samples of every shard, (S,) int64.

    The first shards hold one sample more than the last if they cannot all be equal. Nodes that take shards in turn
    then differ by at most one sample.
    """
    return capacity // shards + (np.arange(shards) < capacity % shards)


def _image_name(index: int, mode: int) -> str:
    return f"{index:09d}.{'jpg' if mode == JPEG else 'ppm'}"


def _ppm_header(height: int, width: int, mode: int) -> bytes:
    return b"" if mode == JPEG else b"P6\n%d %d\n255\n" % (width, height)


def _tar_header(name: str, size: int) -> bytes:
    """A ustar header with a name and a size; mode 0644; user, group and time 0."""
    mode, owner, time = b"0000644\0", b"0000000\0", b"00000000000\0"
    first = name.encode().ljust(100, b"\0") + mode + owner + owner + b"%011o\0" % size + time
    link = bytes(100)
    second = b"0" + link + b"ustar\x0000"
    # The checksum counts its own eight bytes as spaces.
    checksum = sum(first) + sum(second) + 8 * ord(" ")
    return (first + b"%06o\0 " % checksum + second).ljust(BLOCK, b"\0")
