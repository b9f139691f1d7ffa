"""Writes tar shards that plain DALI and the webdataset package read; `shard_layout` describes them."""

import binascii
import ctypes
import hashlib
import io
import os
from collections.abc import Container, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastdeit.pipelines.formats import sidecar
from fastdeit.pipelines.formats.files import beside, mark, sync_folder, write_synced
from fastdeit.pipelines.formats.shard_layout import (
    END,
    KIND,
    KNOWN,
    KNOWN_NODES,
    MAX_SAMPLES,
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
    node_list,
    node_name,
    shard_count,
    shard_name,
    shard_sizes,
)
from fastdeit.pipelines.formats.shards import ShardDataset
from fastdeit.pipelines.formats.writer import Record, Writer

DEFAULT_SHARD_SIZE = 10_000  # 129 shards of ImageNet's training images, about 1 GB each


class ShardWriter(Writer):
    """Streams at most `capacity` samples into a folder of tar shards that appears whole or not at all; a `Writer`.

    shard_size  samples of a shard at most
    nodes       the number of shards is a multiple of it, and `nodes/` lists the shards of each node

    `capacity` decides how many samples a shard holds: nodes differ by at most one sample. If fewer are added, the last
    shards stay short or are left out; `node_samples` of the sidecar counts the samples of each node.

    Until `finish`, all data is in the folder `<path>.partial`. It then replaces a data set that fastdeit-convert
    wrote, and nothing else. If the file system can exchange two names, one of both always has the name; otherwise the
    old one waits in `<path>.replaced`.

    Raises ShardError for a sample that the format cannot hold, and before it would replace any other file.
    """

    _Error, _most = ShardError, MAX_SIZE

    def __init__(
        self,
        path: str | os.PathLike[str],
        capacity: int,
        *,
        shard_size: int = DEFAULT_SHARD_SIZE,
        nodes: int = 1,
    ) -> None:
        self.path = Path(path)
        if not 1 <= capacity <= MAX_SAMPLES:
            raise ShardError(f"{self.path}: {capacity} samples to write; shards hold from 1 to {MAX_SAMPLES:,}")
        if shard_size < 1 or nodes < 1:
            raise ShardError(f"{self.path}: shards of {shard_size} samples for {nodes} nodes: give 1 or more of both")
        if self.path.name in ("", ".."):
            raise ShardError(f"{self.path}: give the folder to write a name, e.g. {self.path / 'train'}")
        shards = shard_count(capacity, shard_size, nodes)
        if shards > min(capacity, MAX_SHARDS):
            raise ShardError(
                f"{self.path}: {capacity} samples cannot be {shards} shards, a multiple of {nodes} nodes "
                f"({MAX_SHARDS:,} are the most). Give a larger --shard-size or fewer --nodes"
            )
        super().__init__(self.path, np.zeros(capacity, SAMPLE))
        self.nodes = nodes
        self._ends = np.cumsum(shard_sizes(capacity, shards))
        self._shard = self._first = self._end = 0
        self._file: BinaryIO | None = None
        self._partial, self._old = (beside(self.path, end) for end in (".partial", ".replaced"))
        self._started = False
        self._flushed: tuple[int, int] | None = None  # shard and byte up to which everything is on disk
        self.check()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # A failed close loses nothing: `restore` relies only on what `flush` put on disk.
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._file = None
        if self._started and not self.keep:
            _remove(self._partial)
        elif error is not None and self._flushed is not None:
            # The rest may be torn, and it takes room on a full disk.
            with suppress(OSError, ShardError):
                self._cut(*self._flushed)

    def restore(self, records: Iterable[Record]) -> int:
        """Take over what an interrupted writer of the same options left; see `Writer`."""
        if not os.path.lexists(self._partial):
            return 0
        _refuse_foreign(self._partial)
        self._started = True
        for record in records:
            if self._count == len(self._samples) or not self._take_up(record):
                break
        if self._file is not None:
            self._file.close()
            self._file = None
        self._started = self._cut(self._shard, self._end)
        self._flushed = (self._shard, self._end) if self._started else None
        return self._count

    def _cut(self, shard: int, end: int) -> bool:
        """Drop everything after byte `end` of a shard; return whether anything is left."""
        kept = {name for number in range(shard) for name in (shard_name(number), index_name(number))}
        if end:
            kept.add(shard_name(shard))
            if (self._partial / shard_name(shard)).stat().st_size > end:
                os.truncate(self._partial / shard_name(shard), end)
        _remove(self._partial, kept)
        return bool(kept)

    def _take_up(self, record: Record) -> bool:
        """Count the sample of `record` as added if it is stored at the next place; return whether it is."""
        height, width, label, mode, size = record.height, record.width, record.label, record.mode, record.size
        head = before(self._count, size=size, height=height, width=width, mode=mode)
        tail = after(self._count, size=size, height=height, width=width, mode=mode, label=label)
        stored = self._output().read(len(head) + size + len(tail))
        data = stored[len(head) : len(head) + size]
        if stored != head + data + tail or binascii.crc32(data) != record.crc32:
            return False
        self._count_in(data, len(head), len(tail), height, width, label, mode)
        return True

    def _append(self, data: bytes, height: int, width: int, label: int, mode: int) -> None:
        if not self._started:
            self._start()
        index, size = self._count, len(data)
        head = before(index, size=size, height=height, width=width, mode=mode)
        tail = after(index, size=size, height=height, width=width, mode=mode, label=label)
        self._output().writelines((head, data, tail))
        self._count_in(data, len(head), len(tail), height, width, label, mode)

    def _start(self) -> None:
        _remove(self._partial)
        self._partial.mkdir()
        self._started = True

    def _output(self) -> BinaryIO:
        if self._file is None:
            path = self._partial / shard_name(self._shard)
            self._file = open(path, "r+b" if path.exists() else "w+b", buffering=1 << 20)  # noqa: SIM115
            self._file.seek(self._end)
        return self._file

    def _count_in(self, data: bytes, head: int, tail: int, height: int, width: int, label: int, mode: int) -> None:
        self._samples[self._count] = (self._end + head, len(data), label, self._shard, height, width, mode)
        self._content.add(data, height=height, width=width, label=label)
        self._count += 1
        self._end += head + len(data) + tail
        if self._count == self._ends[self._shard]:
            self._close_shard()

    def _close_shard(self) -> None:
        file = self._output()
        file.write(END)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._file = None
        index = index_file(self._first, self._samples[self._first : self._count])
        write_synced(self._partial / index_name(self._shard), index)
        self._shard, self._first, self._end = self._shard + 1, self._count, 0

    def flush(self) -> None:
        """Put every sample added so far on disk; see `Writer`."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._started:
            sync_folder(self._partial)
            self._flushed = self._shard, self._end

    def finish(self, *, class_names: list[str], **described: Any) -> dict[str, Any]:
        """Write tables, lists and sidecar and give the folder its name; see `Writer`."""
        samples = self._added(class_names)
        if self._end:
            self._close_shard()
        table = io.BytesIO()
        np.lib.format.write_array(table, samples, version=(1, 0), allow_pickle=False)
        write_synced(self._partial / TABLE, table.getvalue())
        (self._partial / NODES).mkdir(exist_ok=True)
        for node in range(self.nodes):
            write_synced(self._partial / NODES / node_name(node), node_list(node, self.nodes, self._shard))
        sync_folder(self._partial / NODES)
        described_by = sidecar.build(
            KIND,
            self._content,
            class_names=class_names,
            metadata_hash=hashlib.sha256(table.getvalue()).hexdigest(),
            described={
                **described,
                "shards": self._shard,
                "nodes": self.nodes,
                "node_samples": np.bincount(samples["shard"] % self.nodes, minlength=self.nodes).tolist(),
            },
        )
        sidecar.write(self._partial / SIDECAR, described_by)
        sync_folder(self._partial)
        self._put_in_place()
        return described_by

    def check(self, replaced: list[int] | None = None) -> None:
        """Raise ShardError unless the folder is free or empty, or fastdeit-convert wrote it; see `Writer`."""
        self._replaced = replaced or self._replaced
        if not os.path.lexists(self.path):
            return
        try:
            _refuse_foreign(self.path)
            # Another program's shards may have the same names.
            if not os.listdir(self.path):
                return
        except OSError as error:
            raise ShardError(f"{self.path}: cannot be looked into ({error.strerror}): name another folder") from error
        move = "move it away, or name another folder"
        if os.path.lexists(self._old):
            raise ShardError(f"{self._old}: is in the way of {self.path}, which is to be replaced: {move}")
        self._check_ours(ShardDataset, SIDECAR, move)

    def _put_in_place(self) -> None:
        self.check()
        old = self._old
        # The data set is complete: an interrupt from here on must not remove it.
        self._started, self._flushed = False, None
        # A folder already there is what an interrupted run moved there, or somebody else's.
        ours = self._replaced is not None and mark(old) == self._replaced
        if not self.path.exists() or not os.listdir(self.path):
            os.rename(self._partial, self.path)
        elif _exchange(self._partial, self.path):
            os.rename(self._partial, old)
            ours = True
        else:
            os.rename(self.path, old)
            try:
                os.rename(self._partial, self.path)
            except OSError:
                os.rename(old, self.path)
                raise
            ours = True
        self.named = True
        sync_folder(self.path.parent)
        if ours:
            _remove(old)


def _refuse_foreign(folder: Path) -> None:
    """Raise ShardError unless `folder` is a folder that holds only files that `ShardWriter` makes."""
    if folder.is_symlink() or not folder.is_dir():
        raise ShardError(f"{folder}: is not a folder: move it away or name another")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name == NODES and entry.is_dir(follow_symlinks=False):
            stranger = next((f"{NODES}/{name}" for name in os.listdir(entry) if not KNOWN_NODES.fullmatch(name)), None)
        else:
            known = KNOWN.fullmatch(entry.name) and not entry.is_dir(follow_symlinks=False)
            stranger = None if known else entry.name
        if stranger:
            raise ShardError(
                f"{folder}: holds {stranger}, which is not part of a data set: move it or name another folder"
            )


def _remove(folder: Path, kept: Container[str] = ()) -> None:
    """Delete the files of a data set except those named in `kept`, and the folder if it is then empty.

    Raises what `_refuse_foreign` raises, before it deletes anything.
    """
    if not os.path.lexists(folder):
        return
    _refuse_foreign(folder)
    for entry in list(os.scandir(folder)):
        if entry.name == NODES:
            for name in os.listdir(entry):
                os.unlink(folder / NODES / name)
            os.rmdir(entry)
        elif entry.name not in kept:
            os.unlink(entry)
    if not kept:
        os.rmdir(folder)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically; False if the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
