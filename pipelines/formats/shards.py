"""Reads tar shards by index; `shard_layout` describes the files, `ShardWriter` writes them."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import threading
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import numpy as np

from fastdeit.pipelines.formats.beton_layout import MAX_CLASSES, MAX_PIXELS, MAX_SIDE, RAW
from fastdeit.pipelines.formats.bounds import read_array_header
from fastdeit.pipelines.formats.open_file import OpenFile, identity
from fastdeit.pipelines.formats.shard_layout import (
    END,
    KIND,
    MAX_SHARDS,
    MAX_SIZE,
    NODES,
    SAMPLE,
    SIDECAR,
    TABLE,
    ShardError,
    after,
    before,
    index_file,
    index_name,
    layout,
    node_list,
    node_name,
    shard_name,
)
from fastdeit.pipelines.formats.sidecar import SidecarError
from fastdeit.pipelines.formats.stored import StoredImages
from fastdeit.pipelines.machine import machine_error, open_file_limit

_HEAD = 16 << 10  # bytes: more than numpy's header of a table takes
_REMEDY = "Convert the data set again, or copy the folder again"
_OPEN_SHARDS = 256  # at once, and at most a quarter of the files that the process may open
_PIECE = SAMPLE.itemsize << 17  # bytes of the table that are read at once


class ShardDataset(StoredImages):
    """Random access to the images in a folder of tar shards that `ShardWriter` wrote; a `Dataset`.

    path           the folder
    height, width  (N,) int32, pixels
    label          (N,) int64
    shard          (N,) int64, which shard an image is in
    offset, size   (N,) int64, where in its shard, bytes
    class_names    of the sidecar, in the order of the labels; None without one
    content_hash   of the sidecar; None without one
    sidecar        as `sidecar` describes it; None without one
    checksums      of the stored bytes, from the sidecar; None without one
    num_classes    length of class_names, or the largest label + 1

    Opening it checks the tables and the sizes of the shards. Raises ShardError naming file, sample and reason, and
    MachineError where the machine cannot read them. Shards open on their first read, and the least recently read ones
    close again, so few are open at a time. Reading a shard that was cut short is an error too. Threads may share an
    object; a pickled one reopens its path.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._closed = False
        self._lock = threading.Lock()
        self._files: OrderedDict[int, OpenFile] = OrderedDict()
        self._most_open = max(1, min(_OPEN_SHARDS, open_file_limit() // 4))
        try:
            self._read_table()
            self._identities = [self._stat(shard, int(size)) for shard, size in enumerate(self._shard_bytes)]
            self._read_sidecar(self.path / SIDECAR, KIND, self._table_hash)
        except (OSError, MemoryError) as error:
            raise machine_error(error, f"{self.path}: cannot be opened") from error

    def _error(self, reason: str, index: int | None = None, file: str = TABLE) -> ShardError:
        where = f"{self.path / file}, sample {index}" if index is not None else str(self.path / file)
        return ShardError(f"{where}: {reason}. {_REMEDY}")

    def _forbid(self, bad: np.ndarray, reason: str) -> None:
        if bad.any():
            raise self._error(reason, int(bad.argmax()))

    def _read_table(self) -> None:
        if not (self.path / TABLE).is_file():
            raise ShardError(
                f"{self.path}: is not a data set of fastdeit-convert: it has no {TABLE}. Convert what it holds"
            )
        samples, self._table_hash = self._load_table()
        if len(samples) == 0:
            raise self._error("it holds no samples")
        shard = samples["shard"].astype(np.int64)
        step = np.diff(shard, prepend=-1)
        wrong = (step < 0) | (step > 1) | (shard >= MAX_SHARDS)
        wrong[0] = step[0] != 1
        self._forbid(wrong, "its shard is neither that of the sample before it nor the next one")
        self._mode = samples["mode"].copy()
        self._forbid(self._mode > RAW, "its mode is neither JPEG nor raw")
        sides = np.stack([samples["height"], samples["width"]])
        self._forbid(((sides == 0) | (sides > MAX_SIDE)).any(0), f"its height or width is 0 or above {MAX_SIDE}")
        pixels = sides.astype(np.int64).prod(0) * 3
        self._forbid(pixels > 3 * MAX_PIXELS, f"it has more than {MAX_PIXELS} pixels")
        self._forbid((samples["size"] == 0) | (samples["size"] > MAX_SIZE), f"its size is 0 or above {MAX_SIZE} bytes")
        wrong = (self._mode == RAW) & (samples["size"].astype(np.int64) != pixels)
        self._forbid(wrong, "its raw pixels do not match its height and width")
        self._forbid(samples["label"] < 0, "its label is negative")
        self._forbid(samples["label"] >= MAX_CLASSES, f"its label is not below {MAX_CLASSES}")
        # Sums of so few, so small sizes cannot overflow.
        offset, self._shard_bytes = layout(samples)
        self._forbid(samples["offset"].astype(np.int64) != offset, "it does not start after the sample before it")
        self.shard, self.offset, self.size = shard, offset, samples["size"].astype(np.int64)
        self.height, self.width = samples["height"].astype(np.int32), samples["width"].astype(np.int32)
        self.label = samples["label"].astype(np.int64)
        self._first = np.flatnonzero(step)
        for array in (self.shard, self.offset, self.size, self.height, self.width, self.label):
            array.setflags(write=False)

    def _load_table(self) -> tuple[np.ndarray, str]:
        """The records of all samples, (N,) SAMPLE, and the sha256 of their file."""
        file = OpenFile(self.path / TABLE)
        head = io.BytesIO(file.read(_HEAD, 0).tobytes())
        try:
            shape, _, dtype = read_array_header(head)
        except ValueError as error:
            raise self._error(f"it is not a table ({error})") from error
        start = head.tell()
        length = file.identity[2] - start
        if dtype != SAMPLE or shape != (length // SAMPLE.itemsize,) or length % SAMPLE.itemsize:
            raise self._error(f"{length} bytes are not a table of {shape} samples, {SAMPLE.itemsize} bytes each")
        digest = hashlib.sha256(head.getvalue()[:start])
        pieces: list[np.ndarray] = [np.zeros(0, np.uint8)]
        # A sparse file may claim far more than it holds: its holes read as zeros, and the first zero is an error.
        for piece in file.pieces(length, start, _PIECE):
            if len(piece) % SAMPLE.itemsize:
                raise self._error("it was cut short while it was read")
            first = sum(map(len, pieces)) // SAMPLE.itemsize
            blank = piece.view(SAMPLE)["size"] == 0
            if blank.any():
                raise self._error(f"its size is 0 or above {MAX_SIZE} bytes", first + int(blank.argmax()))
            digest.update(piece.data)
            pieces.append(piece)
        samples = np.concatenate(pieces).view(SAMPLE)
        if shape != samples.shape:
            raise self._error("it was cut short while it was read")
        return samples, digest.hexdigest()

    def _stat(self, shard: int, size: int) -> tuple[int, int, int, int]:
        name = shard_name(shard)
        try:
            status = os.stat(self.path / name)
        except FileNotFoundError as error:
            raise self._error("it is missing", file=name) from error
        if status.st_size != size:
            raise self._error(f"it has {status.st_size} bytes instead of {size}", file=name)
        return identity(status)

    def read(self, index: int) -> np.ndarray:
        """Stored bytes of sample `index`: (size,) uint8, read-only.

        Raises IndexError for an index outside the data set, ShardError where its shard was changed, MachineError where
        the machine cannot read it, ValueError after `close`.
        """
        self._check_index(index)
        shard, size = int(self.shard[index]), int(self.size[index])
        file = self._open(shard, index)
        try:
            data = file.read(size, int(self.offset[index]))
        except (OSError, MemoryError) as error:
            where = f"{self.path / shard_name(shard)}, sample {index}"
            raise machine_error(error, f"{where}: cannot be read") from error
        if len(data) != size:
            reason = f"the shard was cut short since it was opened: {len(data)} of {size} bytes are left"
            raise self._error(reason, index, shard_name(shard))
        data.setflags(write=False)
        return data

    def _open(self, shard: int, index: int) -> OpenFile:
        with self._lock:
            if self._closed:
                raise ValueError(f"{self.path}: sample {index} was requested after the data set was closed")
            file = self._files.get(shard)
            if file is None:
                file = self._open_anew(shard, index)
                self._files[shard] = file
                if len(self._files) > self._most_open:
                    self._files.popitem(last=False)  # closes after the last read in progress
            self._files.move_to_end(shard)
            return file

    def _open_anew(self, shard: int, index: int) -> OpenFile:
        name = shard_name(shard)
        while True:
            try:
                file = OpenFile(self.path / name)
                break
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE) and self._files:
                    self._files.popitem(last=False)
                    continue
                raise machine_error(error, f"{self.path / name}, sample {index}: cannot be opened") from error
        if file.identity != self._identities[shard]:
            raise self._error("it was changed or replaced since the data set was opened", index, name)
        return file

    def check(self) -> list[str]:
        """Problems outside the samples' own bytes, a sentence each; empty if there are none.

        Compares every tar header, label, index and list with the table. Raises MachineError.
        """
        try:
            again = ShardDataset(self.path)
            samples, table_hash = self._load_table()
            return self._check_against(again, samples, table_hash)
        except (ShardError, SidecarError) as error:
            return [str(error)]
        except OSError as error:
            raise machine_error(error, f"{self.path}: cannot be checked") from error

    def _check_against(self, again: ShardDataset, samples: np.ndarray, table_hash: str) -> list[str]:
        now, then = (table_hash, again.sidecar, again._identities), (self._table_hash, self.sidecar, self._identities)
        if now != then:
            return [f"{self.path}: it was changed or replaced since the data set was opened"]
        ends = np.append(self._first, len(self)).tolist()
        findings = []
        for shard, (first, end) in enumerate(pairwise(ends)):
            findings += self._check_shard(shard, first, samples[first:end])
        return findings + self._check_strays() + self._check_nodes()

    def _check_shard(self, shard: int, first: int, samples: np.ndarray) -> list[str]:
        try:
            file = self._open(shard, first)
        except ShardError as error:
            return [str(error)]
        path, findings = self.path / shard_name(shard), []
        for index, (offset, size, label, _, height, width, mode) in enumerate(samples.tolist(), first):
            head = before(index, size=size, height=height, width=width, mode=mode)
            tail = after(index, size=size, height=height, width=width, mode=mode, label=label)
            if file.read(len(head), offset - len(head)).tobytes() != head:
                findings.append(
                    f"{path}, sample {index}: the header before its bytes is not what was written. {_REMEDY}"
                )
            if file.read(len(tail), offset + size).tobytes() != tail:
                findings.append(
                    f"{path}, sample {index}: the label or padding after its bytes is not what was written. {_REMEDY}"
                )
        if file.read(len(END) + 1, int(self._shard_bytes[shard]) - len(END)).tobytes() != END:
            findings.append(f"{path}: it does not end in two blocks of zeros. {_REMEDY}")
        return findings + self._compare(index_name(shard), index_file(first, samples))

    def _check_strays(self) -> list[str]:
        known = {name for shard in range(len(self._first)) for name in (shard_name(shard), index_name(shard))}
        stray = sorted(name for name in os.listdir(self.path) if name.startswith("shard-") and name not in known)
        return [
            f"{self.path / name}: it is not part of this data set; remove it, or other readers will use it"
            for name in stray
        ]

    def _check_nodes(self) -> list[str]:
        if self.sidecar is None:
            return []
        folder, nodes = self.path / NODES, self.sidecar.get("nodes")
        names = set(os.listdir(folder)) if folder.is_dir() else set()
        # The folder bounds the loop; a hostile sidecar may hold any number.
        if nodes != len(names) or names != {node_name(node) for node in range(len(names))}:
            return [f"{folder}: it does not hold exactly the lists of {nodes} nodes"]
        findings = []
        for node in range(len(names)):
            findings += self._compare(f"{NODES}/{node_name(node)}", node_list(node, len(names), len(self._first)))
        return findings

    def _compare(self, name: str, expected: bytes) -> list[str]:
        try:
            file = OpenFile(self.path / name)
            if file.read(len(expected) + 1, 0).tobytes() == expected:
                return []
        except FileNotFoundError:
            return [f"{self.path / name}: it is missing. {_REMEDY}"]
        return [f"{self.path / name}: it is not what was written. {_REMEDY}"]

    def close(self) -> None:
        """Drop the shards; each closes after the last read in progress."""
        with self._lock:
            self._closed = True
            self._files.clear()
