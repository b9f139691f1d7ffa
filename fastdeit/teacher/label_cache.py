"""The teacher's labels for every sample of a run, stored, so that training needs no teacher.

A sample's pixels depend only on the recipe and the data (docs/design.md), so any number of processes can compute its
label once, and any number of runs can use it. A cache is a folder:

    labels.json       `key`: the fields that the pixels depend on; the teacher's name and fingerprint; `kind` "hard" or
                      "soft", `topk`, `num_classes`; `epochs`: a file and its SHA-256 for each epoch
    epoch-0000.npy    hard: (samples of an epoch,) uint16 or uint32, in the order of the global batches
    epoch-0000.npz    soft: `index` (samples, topk) and `logits` (samples, topk) float16
    labels.lock       the writing process holds it, so that several processes may label epochs of one run
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastdeit.config import Recipe
from fastdeit.data import TrainingData
from fastdeit.pipelines.errors import UserError, naming
from fastdeit.pipelines.formats.bounds import read_array, read_npz
from fastdeit.pipelines.formats.files import atomic_write, open_regular
from fastdeit.pipelines.locks import lock
from fastdeit.pipelines.machine import machine_error
from fastdeit.pipelines.parsing import read_json
from fastdeit.subsets import left_out

_FORMAT, _VERSION = "fastdeit-labels", 1
_INDEX, _LOCK = "labels.json", "labels.lock"
_PIXELS = "data.loader (pixels)"
# The fields of the `augment` section that do not change the pixels of a training sample.
_NO_PIXELS = ("label_smoothing", "eval_crop")


def pixel_key(recipe: Recipe, data: TrainingData) -> dict[str, Any]:
    """Everything that the pixels of the run's samples depend on, under the recipe's names.

    The number of processes counts only for mixing groups that are a process's whole batch. Raises UserError for a data
    set without a sidecar, since nothing identifies its content.
    """
    if data.loader.dataset.content_hash is None:
        raise UserError(
            f"{data.loader.dataset.path} has no sidecar with its content hash: convert it with fastdeit-convert"
        )
    d = recipe.departures
    augment = {f"augment.{k}": v for k, v in recipe.to_dict()["augment"].items() if k not in _NO_PIXELS}
    if augment["augment.crop"] == "random_resized":  # labels of older versions know no other
        del augment["augment.crop"]
    pixels = data.loader.pixels
    parts, curriculum = recipe.parts(), {}
    if not parts.plain:  # the epochs of its parts depend on the length of the run
        curriculum = {
            "run.epochs": parts.epochs,
            "curriculum.sizes": list(parts.sizes),
            "curriculum.magnitudes": list(parts.magnitudes),
        }
    return {
        "data.train (content)": data.loader.dataset.content_hash,
        _PIXELS: pixels,
        **({"data.hw_decoder_load": recipe.data.hw_decoder_load} if pixels == "nvjpeg" else {}),
        **left_out(recipe.data),
        "data.repeats": data.repeats,
        "data.cell_groups": recipe.data.cell_groups,
        "run.seed": recipe.run.seed,
        "run.global_batch": recipe.run.global_batch,
        "model.img_size": recipe.model.img_size,
        "mixing group size": data.order.group_size,
        "departures.placement": d.placement,
        "departures.order_seed": d.order_seed,
        "departures.epoch_multiple": d.epoch_multiple,
        "departures.cutmix_box": d.cutmix_box,
        **augment,
        **curriculum,
    }


def labelled_pixels(recipe: Recipe) -> tuple[str, str] | None:
    """The pixels of the labels that `recipe` uses or adds to, and a name for them; None without labels."""
    folder = recipe.teacher.labels
    if folder is None or recipe.objective.distillation == "none" or not (folder / _INDEX).is_file():
        return None
    return str(LabelCache(folder).described.key.get(_PIXELS)), f"the labels in {folder}"


@dataclasses.dataclass(frozen=True)
class Described:
    """The description of a cache; `teacher` is a fingerprint, `topk` is 0 for hard labels."""

    key: dict[str, Any]
    teacher: str
    teacher_name: str
    class_names: list[str] | None
    num_classes: int
    topk: int

    @property
    def kind(self) -> str:
        return "soft" if self.topk else "hard"


class LabelWriter:
    """Stores the labels of a run epoch by epoch, each file whole or not at all.

    Several processes may add to a folder of the same key, teacher and kind at the same time. Raises UserError, naming
    the field, if the folder holds other labels.
    """

    def __init__(self, folder: Path, described: Described) -> None:
        self.folder, self._described = folder, described
        self._stored = self._open()

    def _open(self) -> LabelCache | None:
        """The labels in the folder now; None without any."""
        folder, described = self.folder, self._described
        if not (folder / _INDEX).exists():
            return None
        stored = LabelCache(folder)
        stored.check(described.key, described.teacher)
        if (stored.described.topk, stored.described.num_classes) != (described.topk, described.num_classes):
            raise UserError(
                f"{folder} holds {stored.described.kind} labels (topk {stored.described.topk}, "
                f"{stored.described.num_classes} classes), not {described.kind} ones (topk {described.topk}, "
                f"{described.num_classes} classes): choose another folder"
            )
        return stored

    def has(self, epoch: int) -> bool:
        return self._stored is not None and self._stored.has(epoch)

    def write(self, epoch: int, labels: np.ndarray, logits: np.ndarray | None = None) -> None:
        """Store the labels of a whole epoch: hard (samples,), or soft classes and `logits` (samples, topk).

        An epoch that another process has stored meanwhile is kept: runs may be using it. Raises MachineError if the
        epoch cannot be written; the rest of the folder is kept.
        """
        try:
            self._write(epoch, labels, logits)
        except OSError as error:
            raise machine_error(error, f"{self.folder}: epoch {epoch}: cannot be written") from error

    def _write(self, epoch: int, labels: np.ndarray, logits: np.ndarray | None) -> None:
        small = labels.astype(np.uint16 if self._described.num_classes <= 1 << 16 else np.uint32)
        name = f"epoch-{epoch:04d}." + ("npy" if logits is None else "npz")

        def save(file: BinaryIO) -> None:
            if logits is None:
                np.save(file, small, allow_pickle=False)
            else:
                np.savez(file, index=small, logits=logits.astype(np.float16))

        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / _LOCK):
            self._stored = self._open()
            if self.has(epoch):
                return
            epochs = {} if self._stored is None else self._stored.epochs
            epochs[str(epoch)] = {"file": name, "sha256": _replace(self.folder / name, save)}
            index = {"format": _FORMAT, "version": _VERSION, **dataclasses.asdict(self._described), "epochs": epochs}
            _replace(self.folder / _INDEX, lambda file: file.write((json.dumps(index, indent=1) + "\n").encode()))
            self._stored = self._open()


class LabelCache:
    """Labels that `LabelWriter` stored. Raises UserError for a folder that holds none, or damaged ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / _INDEX
        if not path.is_file():
            raise UserError(f"{folder} holds no teacher labels ({_INDEX}): make them with fastdeit-label")
        try:
            index = read_json(path)
            if (index.pop("format"), index.pop("version")) != (_FORMAT, _VERSION):
                raise UserError(f"{path}: not labels of version {_VERSION}: make them again with fastdeit-label")
            self.epochs: dict[str, dict[str, str]] = dict(index.pop("epochs"))
            self.described = d = Described(**index)
            typed = isinstance(d.key, dict) and type(d.num_classes) is int and type(d.topk) is int
            files = [(e["file"] + e["sha256"], int(epoch)) for epoch, e in self.epochs.items()]
            if not typed or any(not isinstance(text, str) for text, _ in files):
                raise ValueError("fields of a wrong type")
        except OSError as error:
            raise machine_error(error, f"{path}: cannot be read") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: damaged ({error!r}): make it again with fastdeit-label") from error
        self._loaded: tuple[int, dict[str, np.ndarray]] | None = None

    def check(self, key: dict[str, Any], teacher: str | None = None) -> None:
        """Raises UserError, naming each field, if the labels belong to other pixels or to another teacher."""
        stored = self.described.key
        differing = [
            f"{name} is {stored.get(name)!r} there and {key.get(name)!r} here"
            for name in dict.fromkeys([*key, *stored])
            if stored.get(name) != key.get(name)
        ]
        if teacher is not None and teacher != self.described.teacher:
            differing.append("another teacher made them (its weights or normalisation differ)")
        if differing:
            raise UserError(
                f"the labels in {self.folder} do not belong to this run: {'; '.join(differing)}. "
                f"Make them for it with fastdeit-label, in another folder"
            )

    def has(self, epoch: int) -> bool:
        """Whether there are labels for `epoch`; reading them checks that they are whole."""
        return str(epoch) in self.epochs and self._path(epoch).is_file()

    def _path(self, epoch: int) -> Path:
        return self.folder / Path(self.epochs[str(epoch)]["file"]).name

    def check_epochs(self, first: int, end: int) -> None:
        """Raises UserError unless there are labels for each epoch from `first` to before `end`."""
        missing = [epoch for epoch in range(first, end) if not self.has(epoch)]
        if missing:
            raise UserError(
                f"{self.folder} has no labels for {len(missing)} of the run's epochs, the first of them "
                f"{missing[0]} (counted from 0): run fastdeit-label with the same recipe to make those that are missing"
            )

    def labels(self, epoch: int, entries: np.ndarray) -> Tensor:
        """Hard labels (B,) int64 of the samples at `entries` of the epoch: step * global batch + position."""
        return torch.from_numpy(self._epoch(epoch, entries)["labels"][entries].astype(np.int64))

    def logits(self, epoch: int, entries: np.ndarray) -> Tensor:
        """Logits (B, num_classes) float32 of the samples; classes that were not stored get probability 0."""
        stored = self._epoch(epoch, entries)
        index = torch.from_numpy(stored["index"][entries].astype(np.int64))
        logits = torch.from_numpy(stored["logits"][entries]).float()
        # Far enough below any logit for a softmax of exactly 0, and finite, so that 0 times it is 0.
        out = torch.full((len(entries), self.described.num_classes), -1e4)
        return out.scatter_(1, index, logits)

    def _epoch(self, epoch: int, entries: np.ndarray) -> dict[str, np.ndarray]:
        if self._loaded is None or self._loaded[0] != epoch:
            self._loaded = epoch, self._read(epoch)
        arrays = self._loaded[1]
        held = len(next(iter(arrays.values())))
        if len(entries) and int(entries.max()) >= held:
            raise UserError(f"{self.folder}: epoch {epoch} has {held} labels, but sample {entries.max()} was requested")
        return arrays

    def _read(self, epoch: int) -> dict[str, np.ndarray]:
        self.check_epochs(epoch, epoch + 1)
        path = self._path(epoch)
        again = "remove it and make it again with fastdeit-label"
        soft = self.described.kind == "soft"
        try:
            with open(open_regular(path), "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != self.epochs[str(epoch)]["sha256"]:
                    raise UserError(f"{path}: it was changed after it was written: {again}")
                file.seek(0)
                size = os.fstat(file.fileno()).st_size
                arrays = read_npz(file, ("index", "logits")) if soft else {"labels": read_array(file, size)}
        except (OSError, MemoryError) as error:
            raise machine_error(error, f"{path}: cannot be read") from error
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: not {self.described.kind} labels ({error}): {again}") from error
        classes = arrays["labels" if "labels" in arrays else "index"]
        shaped = classes.ndim == 1 + soft and (not soft or classes.shape == arrays["logits"].shape)
        if not shaped or classes.dtype.kind != "u":
            raise UserError(f"{path}: not {self.described.kind} labels: {again}")
        if classes.size and int(classes.max()) >= self.described.num_classes:
            raise UserError(f"{path}: class {classes.max()} of {self.described.num_classes}: {again}")
        return arrays


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> str:
    """Have `write` make the file at `path`, which is the old one or the new one whatever happens; its SHA-256."""
    data = io.BytesIO()  # NumPy says of a file on a full disk how many bytes it lacks, not why
    write(data)
    with atomic_write(path) as file:
        file.write(data.getbuffer())
    return hashlib.sha256(data.getbuffer()).hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes that do the same, where the file system has locks."""
    with naming(path), open(path, "ab") as file:
        lock(file, wait=True)
        yield
