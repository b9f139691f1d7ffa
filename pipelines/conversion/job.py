"""Runs one conversion: writes the samples, and keeps or removes them after an interrupt."""

import errno
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fastdeit.pipelines.console import progress_bar, say
from fastdeit.pipelines.conversion.destination import check_leftovers, check_rejects, journal_path, rejects_path
from fastdeit.pipelines.conversion.encode import CHANGES, Encoding
from fastdeit.pipelines.conversion.journal import Journal, Kept, difference
from fastdeit.pipelines.conversion.workers import ConvertError, Encoded, Reject, encoded
from fastdeit.pipelines.errors import remedy
from fastdeit.pipelines.formats.files import atomic_write, beside, mark
from fastdeit.pipelines.formats.writer import Record, Writer
from fastdeit.pipelines.sources import Source
from fastdeit.pipelines.sources.imagenet import real_labels as read_real_labels

FLUSH_SECONDS = 2.0  # of work that a crash may cost
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_VERSION = 1  # of the journal's description


class DiskFull(ConvertError):
    """The disk is full; `--resume` continues from what is kept."""


class Conversion:
    """A conversion in progress.

    position  samples of `order` handled so far, by this run and the one it resumed
    restored  those handled by the resumed run
    saved     samples in the journal
    size      bytes of the images stored
    pending   samples that are not in the journal yet
    """

    def __init__(
        self, source: Source, dest: Path, order: np.ndarray, options: dict[str, Any], real_labels: Path | None
    ) -> None:
        self.source, self.dest, self.order, self.options = source, dest, order, options
        self.counts: Counter[str] = Counter(dict.fromkeys(CHANGES, 0))
        self.rejects: list[Reject] = []
        self.notes: list[str] = []
        self.position = self.restored = self.saved = self.size = self.last_label = 0
        self.pending: list[Kept | Reject] = []
        self._replaced: list[int] | None = None  # `files.mark` of what an interrupted run was about to replace
        names = [source.name(index) for index in order.tolist()]
        self.names_hash = _hash(names)
        self.real = None if real_labels is None else read_real_labels(real_labels, names)

    def write(
        self, writer: Writer, encoding: Encoding, workers: int, *, skip: bool, resume: bool, progress: bool
    ) -> dict[str, Any]:
        """Write everything and return the sidecar. An error keeps what the journal holds, or leaves no trace."""
        with self._writing():
            check_rejects(rejects_path(self.dest))
            journal = Journal(journal_path(self.dest))
        with journal:
            # Keep what another run left, whatever happens, until this run takes it over or drops it.
            writer.keep = journal.begun
            self._replaced = journal.replaced()
            try:
                with self._writing():
                    writer.check(self._replaced)
                    if not journal.begun:
                        check_leftovers(self.dest)
                with writer:
                    self._take_up(writer, journal, encoding, resume)
                    self._store_all(writer, journal, encoding, workers, skip, progress)
                    sidecar = self._finish(writer, journal)
            except BaseException as error:
                if writer.named:
                    journal.remove()
                    if isinstance(error, ConvertError):
                        raise ConvertError(
                            f"{self.dest}: is complete, but may not survive a power cut ({error.__cause__}): check it "
                            f"with --verify"
                        ) from error
                    raise
                if not writer.keep and self._replaced is None:
                    journal.remove()
                if isinstance(error, DiskFull):
                    raise DiskFull(f"{error}. {self._left(writer.keep)}") from error.__cause__
                if writer.keep and progress and not isinstance(error, Exception):
                    say(f"{self.dest}: {self._kept()}; continue with --resume", "stderr")
                raise
            journal.remove()
        return sidecar

    def _kept(self) -> str:
        return f"{self.saved} of {len(self.order)} images are kept"

    def _left(self, kept: bool) -> str:
        """The end of the message for a full disk: what is left, and what to do."""
        if not kept:
            return "The partial output has been removed: make room or name another place, then convert again"
        kept_images = self._kept() if self.saved else "The progress of the interrupted conversion is kept"
        return f"{kept_images} in {beside(self.dest, '.partial')}: make room and continue with --resume"

    def _take_up(self, writer: Writer, journal: Journal, encoding: Encoding, resume: bool) -> None:
        """Continue an interrupted conversion, or start afresh."""
        description = {
            "version": _VERSION,
            "options": self.options,
            "source": self._describe(),
            "class_names": _hash(self.source.class_names),
            "names": self.names_hash,
            "real_labels": _hash(self.real),
        }
        description = json.loads(json.dumps(description))
        then = journal.description()
        if then is not None and resume:
            if changed := difference(then, description):
                raise ConvertError(
                    f"{self.dest}: the interrupted conversion was different: {changed}. "
                    f"Resume with its settings, or start again without --resume"
                )
            with self._writing():
                count = writer.restore(entry.record for entry in journal.entries() if isinstance(entry, Kept))
                journal.cut(count)
                self._note_replaced(journal)
            self._count_restored(journal, encoding)
            writer.keep = self.restored > 0
        else:
            if done := sum(1 for _ in journal.entries()):
                self.notes.append(f"an interrupted conversion had done {done} images, which --resume would have kept")
            with self._writing():
                writer.restore(())
                writer.keep = False
                journal.begin(description)
                self._note_replaced(journal)
        if resume and not self.restored:
            self.notes.append("there was nothing to resume, so it started at the first image")
        if not journal.locked:
            self.notes.append("this file system has no locks: another conversion may have written here meanwhile")

    def _note_replaced(self, journal: Journal) -> None:
        """Keep, for another resume, which data set the interrupted run was about to replace."""
        if self._replaced is not None:
            journal.note_replaced(self._replaced)

    def _count_restored(self, journal: Journal, encoding: Encoding) -> None:
        last: tuple[int, Kept] | None = None
        for entry in journal.entries():
            if isinstance(entry, Kept):
                last = int(self.order[self.position]), entry
            self._count(entry)
        self.restored = self.saved = self.position
        if last is not None:
            self._compare(*last, encoding)
        if self.restored:
            self.notes.append(f"it continued after {self.restored} images of an interrupted conversion")

    def _compare(self, index: int, entry: Kept, encoding: Encoding) -> None:
        """Raise ConvertError unless the source still holds the sample that was stored last."""
        (now,) = encoded(self.source, [index], encoding, 1)
        if not isinstance(now, Encoded) or (now.crc32, now.label) != (entry.record.crc32, entry.record.label):
            raise ConvertError(
                f"{self.source.name(index)}, sample {index}: is not what the interrupted conversion stored, "
                f"so the source has changed. Start again without --resume"
            )

    def _store_all(
        self, writer: Writer, journal: Journal, encoding: Encoding, workers: int, skip: bool, progress: bool
    ) -> None:
        if self.rejects and not skip:
            reject = self.rejects[0]
            raise ConvertError(
                f"{reject.name}, sample {reject.index}: was left out before the interruption: {reject.reason}. Go on "
                f"with --on-error skip --resume, or mend the image and start again without --resume"
            )
        flushed = time.monotonic()
        with (
            closing(encoded(self.source, self.order[self.position :].tolist(), encoding, workers)) as samples,
            progress_bar(self.notes, progress, initial=self.position, total=len(self.order)) as bar,
        ):
            try:
                for sample in samples:
                    if isinstance(sample, Reject) and not skip:
                        raise self._rejected(sample)
                    with self._writing():
                        self._store(writer, sample)
                        if time.monotonic() - flushed >= FLUSH_SECONDS:
                            self._save(writer, journal)
                            flushed = time.monotonic()
                    bar.update()
                    if self.rejects:
                        bar.set_postfix_str(f"{len(self.rejects)} left out", refresh=False)
            except DiskFull:
                raise
            except BaseException:
                with self._writing():
                    # An interrupt may have stopped `_save` after the journal had the pending samples.
                    if self.pending and sum(1 for _ in journal.entries()) == self.position:
                        self._saved(writer)
                    self._save(writer, journal)
                raise
            with self._writing():
                self._save(writer, journal)

    def _store(self, writer: Writer, sample: Encoded | Reject) -> None:
        if isinstance(sample, Reject):
            entry = sample
        else:
            image, label = sample.image, sample.label
            writer.add(image.data, height=image.height, width=image.width, label=label, mode=image.mode)
            record = Record(image.height, image.width, label, image.mode, len(image.data), sample.crc32)
            entry = Kept(record, image.changes)
        self._count(entry)
        self.pending.append(entry)

    def _count(self, entry: Kept | Reject) -> None:
        self.position += 1
        if isinstance(entry, Reject):
            self.rejects.append(entry)
            return
        self.counts.update(entry.changes)
        self.size += entry.record.size
        self.last_label = max(self.last_label, entry.record.label)

    def _save(self, writer: Writer, journal: Journal) -> None:
        if self.pending:
            writer.flush()
            journal.append(self.pending)
            self._saved(writer)

    def _saved(self, writer: Writer) -> None:
        self.pending, self.saved, writer.keep = [], self.position, True

    def _finish(self, writer: Writer, journal: Journal) -> dict[str, Any]:
        if len(self.rejects) == len(self.order):
            writer.keep = False
            raise ConvertError(
                f"{self.dest}: none of the {len(self.order)} images can be read. The first is {self.rejects[0].name}: "
                f"{self.rejects[0].reason}"
            )
        rejected = [reject.index for reject in self.rejects]
        described: dict[str, Any] = {"counts": dict(self.counts), "rejected": rejected}
        if self.real is not None:
            kept = ~np.isin(self.order, rejected)
            described["real_labels"] = [self.real[i] for i in np.flatnonzero(kept)]
        class_names = self.source.class_names or [str(i) for i in range(self.last_label + 1)]
        with self._writing():
            writer.check(self._replaced)
            if (replaced := mark(self.dest)) is not None:
                journal.note_replaced(replaced)
            # The list first: a data set under its final name is complete.
            _write_rejects(rejects_path(self.dest), self.rejects)
            return writer.finish(class_names=class_names, source=self._describe(), options=self.options, **described)

    def _describe(self) -> dict[str, Any]:
        return {**self.source.describe(), "samples": len(self.source)}

    def _rejected(self, reject: Reject) -> ConvertError:
        return ConvertError(
            f"{reject.name}, sample {reject.index}: cannot be converted: {reject.reason}. Mend the image and go on "
            f"with --resume, or leave such images out with --on-error skip --resume"
        )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = error.filename or self.dest
            if error.errno not in _FULL:
                raise ConvertError(f"{where}: cannot be written ({error.strerror}): {remedy(error)}") from error
            needed = ""
            if self.size:
                total = self.size * len(self.order) / self.position
                needed = f" after {self.size / 1e6:.1f} MB; about {total / 1e6:.1f} MB are needed in all"
            raise DiskFull(f"{where}: cannot be written ({error.strerror}){needed}") from error


def _write_rejects(path: Path, rejects: list[Reject]) -> None:
    check_rejects(path)
    if not rejects:
        path.unlink(missing_ok=True)
        return
    beside(path, ".partial").unlink(missing_ok=True)  # of a conversion that was interrupted here
    with atomic_write(path, ".partial") as file:
        file.writelines((json.dumps(asdict(reject)) + "\n").encode() for reject in rejects)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
