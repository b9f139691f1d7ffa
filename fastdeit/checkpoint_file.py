"""Checks a checkpoint file before PyTorch reads it, and its contents before anything uses them.

Files are untrusted, and disks fail. torch.save writes a zip archive with a checksum for each record. torch.load ignores
these checksums, so this module compares them. It accepts only uncompressed records, so that none takes more memory than
the file takes on disk, and only pickles that name the parts of a state dict.
"""

import argparse
import io
import os
import pickletools
import zipfile
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.bounds import BoundedReads

_PIECE = 1 << 20  # bytes compared at once
_MOST_READ = 16 << 20  # bytes of the archive's directory or its pickle: 60,000 tensors, or a million class names
_MOST_VALUES = 1 << 22  # in a checkpoint, counting repeats
_MOST_REPEATED = 64 << 20  # bytes of a tensor that repeats stored values, as an expanded one does
_DEEPEST = 64  # nested dicts and lists
_LARGEST = 2**63  # a larger int could take longer to print than to read

_STORAGES = {"Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"}
_DTYPES = {"float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}
# The parts of a state dict. PyTorch's own list also has bytearray, with which ten bytes can allocate ten gigabytes.
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
    """A checkpoint file whose bytes changed after it was written, or a file that is not a checkpoint."""


class ForeignError(UserError):
    """A whole file that is refused because it holds something that no checkpoint needs."""


def check_file(file: BinaryIO, path: object) -> str | None:
    """Check every byte of an open file that torch.save wrote. Returns a warning if it has no checksums, else None.

    Raises DamagedError if a checksum differs or the file is truncated, ForeignError for a compressed record or a
    pickle that names more than tensors and plain containers, ValueError if it is not a checkpoint at all, UserError
    if it is larger than this machine's memory.
    """
    size = os.fstat(file.fileno()).st_size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise UserError(
            f"{path} has {size / 2**30:.1f} GiB, but this machine has only {memory / 2**30:.1f} GiB of memory: load it "
            "on a larger one"
        )
    file.seek(0)
    head = file.read(2)
    if head != b"PK":
        if head[:1] != b"\x80":
            raise ValueError("it does not begin like a checkpoint")
        file.seek(0)
        _check_pickles(io.BytesIO(file.read(_MOST_READ)), 5, path)
        return (
            f"{path} is in PyTorch's format from before 1.6, which has no checksums, so damage to its weights goes "
            "unnoticed: load it and save it again with torch.save"
        )
    try:
        with zipfile.ZipFile(BoundedReads(file, _MOST_READ)) as archive:
            return _check_archive(archive, size, path)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError) as error:
        raise DamagedError(f"{path} is damaged ({error}): fetch it again, or use another") from error


def _check_archive(archive: zipfile.ZipFile, size: int, path: object) -> str | None:
    records = archive.infolist()
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise ForeignError(
                f"{path} holds the compressed record {record.filename!r}, which torch.save never writes: if you trust "
                "it, load it and save it again with torch.save"
            )
    names = [record.filename for record in records]
    if len(set(names)) != len(names):
        raise zipfile.BadZipFile("it holds two records of the same name")
    if sum(record.file_size for record in records) > size:
        raise zipfile.BadZipFile(f"its records take more than the file's {size} bytes")
    pickles = [record for record in records if record.filename.endswith("data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > _MOST_READ:
        raise zipfile.BadZipFile(f"its data.pkl is missing, or has more than {_MOST_READ} bytes")
    summed = any(record.CRC for record in records)
    for record in records:
        if summed:
            # Raises BadZipFile, naming the record, if its checksum differs.
            with archive.open(record) as stored:
                while stored.read(_PIECE):
                    pass
    if not summed:
        pickles[0].CRC = None  # pyright: ignore[reportAttributeAccessIssue]  # so that zipfile does not compare it
    _check_pickles(io.BytesIO(archive.read(pickles[0])), 1, path)
    if summed:
        return None
    return f"{path} was saved without checksums, so damage to its weights goes unnoticed: load it and save it again"


def _check_pickles(stream: io.BytesIO, count: int, path: object) -> None:
    """Raise ForeignError if one of the `count` pickles at the start of `stream` names anything outside `_PLAIN`."""
    try:
        for _ in range(count):
            for code, argument, _ in pickletools.genops(stream):
                if code.name == "GLOBAL" and argument not in _PLAIN:
                    raise ForeignError(_foreign(path, str(argument)))
                if code.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
                    raise ForeignError(_foreign(path, code.name))
    except ForeignError:
        raise
    except Exception:  # truncated, or not a pickle: torch.load has the better message
        return


def _foreign(path: object, what: str) -> str:
    return (
        f"{path} holds an object of {what[:200]!r}, but only tensors and plain containers are loaded: save just its "
        "state dict, with torch.save or as .safetensors"
    )


def check_values(stored: Any, path: object) -> None:
    """Raise ForeignError if a checkpoint would take excessive time or memory to walk through or print.

    A list can hold another list many times, which holds a third many times, and so on: a file of a kilobyte then prints
    as a gigabyte. A tensor can be a view that repeats one value, or have no storage.
    """
    if _count(stored, 0, {}, path) > _MOST_VALUES:
        raise ForeignError(f"{path} holds more than {_MOST_VALUES} values, counting repeats: {_SAVE}")


_SAVE = "it was not loaded; save only model.state_dict()"


def _count(value: Any, depth: int, counted: dict[int, int], path: object) -> int:
    """Number of values in `value`; those of a shared container count each time it appears."""
    if isinstance(value, Tensor):
        _check_tensor(value, path)
        return 1
    if isinstance(value, str):
        return 1 + len(value) // 64
    if isinstance(value, int) and abs(value) >= _LARGEST:
        raise ForeignError(f"{path} holds an integer of more than 64 bits: {_SAVE}")
    if value is None or isinstance(value, (int, float, torch.dtype, torch.device)):
        return 1
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if not isinstance(value, (dict, list, tuple, set)):
        raise ForeignError(f"{path} holds a {type(value).__name__}: {_SAVE}")
    if depth == _DEEPEST:
        raise ForeignError(f"{path} holds containers nested more than {_DEEPEST} deep: {_SAVE}")
    known = counted.get(id(value))
    if known == 0:
        raise ForeignError(f"{path} holds a container that contains itself: {_SAVE}")
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
            f"{path} holds a tensor of shape {tuple(tensor.shape)} that does not store its own values "
            f"(on {tensor.device.type}, {tensor.layout}): {_SAVE}"
        )
