"""What is checked of a checkpoint file before PyTorch reads it, and of what it held before anything uses it.

Files are untrusted, and disks are not perfect. A file of torch.save's is a zip archive with a checksum for each record,
which torch.load does not look at: here every one is compared. Its records are stored as they are, so that nothing in it
takes more memory than the file does on the disk. The pickle in it may name nothing but what a state dict is made of.
"""

from __future__ import annotations

import argparse
import io
import os
import pickletools
import zipfile
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastdeit.pipelines.errors import UserError

_PIECE = 1 << 20  # bytes that are compared at once
_MOST_READ = 16 << 20  # bytes of the archive's directory, or of its pickle: 60,000 tensors, or a million class names
_MOST_VALUES = 1 << 22  # in a checkpoint, each counted as often as it is found there
_MOST_REPEATED = 64 << 20  # bytes that a tensor would take whose numbers are fewer than its elements
_DEEPEST = 64  # dicts and lists one in another
_LARGEST = 2**63  # an int of more would take longer to print than to read

_STORAGES = {"Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"}
_DTYPES = {"float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}
# What a state dict is made of. PyTorch's own list is longer, and has bytearray, by which ten bytes make ten gigabytes.
_PLAIN = {
    "collections OrderedDict",
    "collections Counter",  # in the state of some of PyTorch's schedulers
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch Size",
    "torch device",
    "__builtin__ set",
    "argparse Namespace",  # which the released training script stores
    *(f"torch {name}Storage" for name in _STORAGES),
    *(f"torch {name}" for name in _DTYPES),
}


class DamagedError(UserError):
    """A checkpoint file whose bytes are not those that were written, or that is no checkpoint."""


class ForeignError(UserError):
    """A file that is whole and holds what no checkpoint needs; it is not loaded."""


class _Bounded(io.RawIOBase):
    """A file of which nobody reads more at once than a checkpoint's directory takes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(_MOST_READ + 1 if size < 0 else min(size, _MOST_READ + 1))
        if len(data) > _MOST_READ:
            raise zipfile.BadZipFile("its directory is longer than a checkpoint's")
        return data


def check_file(file: BinaryIO, path: object) -> str | None:
    """Look at all bytes of an open file of torch.save's; a sentence where nothing vouches for them, else None.

    Raises DamagedError where a checksum differs or the file is cut short, ForeignError for a compressed record or a
    pickle that names more than tensors and plain containers, ValueError for what is no checkpoint at all, UserError for
    a file that this machine cannot hold.
    """
    size = os.fstat(file.fileno()).st_size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise UserError(
            f"{path} has {size / 2**30:.1f} GiB, this machine {memory / 2**30:.1f} GiB of memory: load it on another"
        )
    file.seek(0)
    head = file.read(2)
    if head != b"PK":
        if head[:1] != b"\x80":
            raise ValueError("it does not begin as one")
        file.seek(0)
        _check_pickles(io.BytesIO(file.read(_MOST_READ)), 5, path)
        return (
            f"{path} is in PyTorch's format from before 1.6, which has no checksums, so damage to its weights goes "
            "unnoticed: load it and save it again with torch.save"
        )
    try:
        with zipfile.ZipFile(_Bounded(file)) as archive:
            return _check_archive(archive, size, path)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError) as error:
        raise DamagedError(f"{path} is damaged ({error}): fetch it again, or use another") from error


def _check_archive(archive: zipfile.ZipFile, size: int, path: object) -> str | None:
    records = archive.infolist()
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise ForeignError(
                f"{path} holds the compressed record {record.filename!r}, which torch.save never writes: load it where "
                "you trust it, and save it again with torch.save"
            )
    names = [record.filename for record in records]
    if len(set(names)) != len(names):
        raise zipfile.BadZipFile("it holds a record twice")
    if sum(record.file_size for record in records) > size:
        raise zipfile.BadZipFile(f"its records have more bytes than the file's {size}")
    pickles = [record for record in records if record.filename.endswith("data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > _MOST_READ:
        raise zipfile.BadZipFile(f"its data.pkl is missing, or has more than {_MOST_READ} bytes")
    summed = any(record.CRC for record in records)
    for record in records:
        if summed:
            # Raises BadZipFile, naming the record, where its bytes have another checksum.
            with archive.open(record) as stored:
                while stored.read(_PIECE):
                    pass
    if not summed:
        pickles[0].CRC = None  # pyright: ignore[reportAttributeAccessIssue]  # so that zipfile compares nothing
    _check_pickles(io.BytesIO(archive.read(pickles[0])), 1, path)
    if summed:
        return None
    return f"{path} was saved without checksums, so damage to its weights goes unnoticed: load it and save it again"


def _check_pickles(stream: io.BytesIO, count: int, path: object) -> None:
    """Raises ForeignError where one of the `count` pickles at the head of `stream` names what is not plain."""
    try:
        for _ in range(count):
            for code, argument, _ in pickletools.genops(stream):
                if code.name == "GLOBAL" and argument not in _PLAIN:
                    raise ForeignError(_foreign(path, str(argument)))
                if code.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
                    raise ForeignError(_foreign(path, code.name))
    except ForeignError:
        raise
    except Exception:  # it is cut short or no pickle at all, which torch.load says better
        return


def _foreign(path: object, what: str) -> str:
    return (
        f"{path} holds an object of {what[:200]!r}, and only tensors and plain containers are loaded: save its state "
        "dict alone, with torch.save or as .safetensors"
    )


def check_values(stored: Any, path: object) -> None:
    """Raises ForeignError where a checkpoint holds what walking through it, or printing it, would not end with.

    Lists may hold one list many times, which hold another many times, and so on: a file of a kilobyte then prints as a
    gigabyte. Tensors may be views that repeat one number, or lie nowhere at all.
    """
    if _count(stored, 0, {}, path) > _MOST_VALUES:
        raise ForeignError(f"{path} holds more than {_MOST_VALUES} values, some of them many times: {_SAVE}")


_SAVE = "it was not loaded; save model.state_dict() alone"


def _count(value: Any, depth: int, counted: dict[int, int], path: object) -> int:
    """How many values there are in `value`, with those of shared containers counted each time."""
    if isinstance(value, Tensor):
        _check_tensor(value, path)
        return 1
    if isinstance(value, str):
        return 1 + len(value) // 64
    if isinstance(value, int) and abs(value) >= _LARGEST:
        raise ForeignError(f"{path} holds a whole number of more than 64 bits: {_SAVE}")
    if value is None or isinstance(value, (int, float, torch.dtype, torch.device)):
        return 1
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if not isinstance(value, (dict, list, tuple, set)):
        raise ForeignError(f"{path} holds a {type(value).__name__}: {_SAVE}")
    if depth == _DEEPEST:
        raise ForeignError(f"{path} holds containers more than {_DEEPEST} deep in one another: {_SAVE}")
    known = counted.get(id(value))
    if known == 0:
        raise ForeignError(f"{path} holds a container that holds itself: {_SAVE}")
    if known is not None:
        return known
    counted[id(value)] = 0
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    total = min(1 + sum(_count(part, depth + 1, counted, path) for part in parts), _MOST_VALUES + 1)
    counted[id(value)] = total
    return total


def _check_tensor(tensor: Tensor, path: object) -> None:
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.numel() * tensor.element_size() > max(tensor.untyped_storage().nbytes(), _MOST_REPEATED):
        raise ForeignError(
            f"{path} holds a tensor of shape {tuple(tensor.shape)} without numbers of its own "
            f"(on {tensor.device.type}, {tensor.layout}): {_SAVE}"
        )
