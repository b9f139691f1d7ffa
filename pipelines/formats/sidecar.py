"""The JSON file beside a data set, for the facts that its format has no place for.

    format          "fastdeit-beton" or "fastdeit-webdataset"
    version         of this layout: 2
    num_samples     images in the data set
    class_names     in the order of the labels
    content_hash    sha256 over every sample in order: height, width, label (int64 each), stored bytes
    metadata_hash   sha256 of the data set's tables, which ties the sidecar to its files
    crc32           base64 of (num_samples,) little-endian uint32: zlib.crc32 of every sample's stored bytes
    seal            sha256 of all other fields as canonical JSON, which detects changes to the sidecar

and the facts that the writer and the conversion add:

    source       the source, how many samples it holds, and what it left out
    options      of the conversion, and the library versions that its bytes depend on
    counts       images by what happened to them, see `encode.CHANGES`
    rejected     source indices of the images left out, in the order of the conversion
    real_labels  ImageNet-ReaL's classes of every sample, if requested
    page_size    of a beton file
"""

import base64
import binascii
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.beton_layout import MAX_CLASSES
from fastdeit.pipelines.formats.files import write_synced
from fastdeit.pipelines.parsing import MAX_JSON, read_json

VERSION = 2
_MOST_OF_A_SAMPLE = 32  # bytes, beyond `MAX_JSON`: a checksum takes 6, ReaL's classes about 20
MAX_REAL = 100  # ReaL classes of an image; the real file has at most 9
_REMEDY = "Convert the data set again, or remove the sidecar to do without class names"


class SidecarError(UserError):
    """A sidecar that is damaged, or that belongs to another data set."""


class ContentHash:
    """Hash of a data set's content, sample by sample; the same in both formats.

    crc32  of each sample's stored bytes so far
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.crc32: list[int] = []

    def add(self, data: bytes | memoryview, *, height: int, width: int, label: int) -> None:
        self._hash.update(np.array([height, width, label], "<i8").tobytes())
        self._hash.update(data)
        self.crc32.append(binascii.crc32(data))

    def __str__(self) -> str:
        return "sha256:" + self._hash.hexdigest()


def build(
    kind: str, content: ContentHash, *, class_names: list[str], metadata_hash: str, described: dict[str, Any]
) -> dict[str, Any]:
    """The sidecar of a data set whose samples were added to `content`."""
    crc32 = np.array(content.crc32, "<u4").tobytes()
    sidecar = {
        "format": kind,
        "version": VERSION,
        "num_samples": len(content.crc32),
        "class_names": class_names,
        **described,
        "content_hash": str(content),
        "metadata_hash": metadata_hash,
        "crc32": base64.b64encode(crc32).decode(),
    }
    # Through JSON, which has no tuples and no integer keys: the same as it will be read.
    sidecar = json.loads(json.dumps(sidecar))
    return {**sidecar, "seal": _seal(sidecar)}


def write(path: Path, sidecar: dict[str, Any]) -> None:
    """Write `sidecar` to `path` and sync it."""
    # Names that are not UTF-8 hold lone surrogates, whose escapes are JSON's own.
    text = json.dumps(sidecar, indent=1, ensure_ascii=False)
    write_synced(path, text.encode("utf-8", "backslashreplace"))


def read(path: Path, *, kind: str, num_samples: int, num_classes: int, metadata_hash: str) -> dict[str, Any]:
    """The sidecar at `path`, of a data set of that many samples whose labels are below `num_classes`.

    Raises SidecarError for one that is damaged, of another version, or of another data set.
    """
    try:
        sidecar = _read(path, num_samples)
        seal = _seal({k: v for k, v in sidecar.items() if k != "seal"}) if isinstance(sidecar, dict) else None
    except ValueError as error:
        raise SidecarError(f"{path}: damaged ({error}). {_REMEDY}") from error
    if not isinstance(sidecar, dict) or (sidecar.get("format"), sidecar.get("version")) != (kind, VERSION):
        raise SidecarError(f"{path}: not a {kind} sidecar of version {VERSION}. {_REMEDY}")
    if sidecar.get("seal") != seal:
        raise SidecarError(f"{path}: damaged (it was changed after it was written). {_REMEDY}")
    names, content = sidecar.get("class_names"), sidecar.get("content_hash")
    if not (isinstance(content, str) and isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise SidecarError(f"{path}: class_names or content_hash have the wrong type. {_REMEDY}")
    if (sidecar.get("num_samples"), sidecar.get("metadata_hash")) != (num_samples, metadata_hash):
        raise SidecarError(f"{path}: it describes a different data set from the one beside it. {_REMEDY}")
    if len(names) > MAX_CLASSES:
        raise SidecarError(f"{path}: {len(names)} class names, but at most {MAX_CLASSES} are allowed. {_REMEDY}")
    if len(names) < num_classes:
        raise SidecarError(f"{path}: {len(names)} class names, but labels up to {num_classes - 1}. {_REMEDY}")
    if len(crc32s(sidecar)) != num_samples:
        raise SidecarError(f"{path}: its crc32 list is not for {num_samples} samples. {_REMEDY}")
    if (real := sidecar.get("real_labels")) is not None and not _are_real_labels(real, num_samples):
        raise SidecarError(
            f"{path}: its real_labels are not {num_samples} lists of up to {MAX_REAL} class numbers. {_REMEDY}"
        )
    return sidecar


def _read(path: Path, num_samples: int) -> Any:
    return read_json(path, MAX_JSON + _MOST_OF_A_SAMPLE * num_samples)


def _are_real_labels(value: Any, num_samples: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == num_samples
        and all(isinstance(labels, list) and len(labels) <= MAX_REAL for labels in value)
        and all(type(label) is int and 0 <= label < MAX_CLASSES for labels in value for label in labels)
    )


def crc32s(sidecar: dict[str, Any]) -> np.ndarray:
    """zlib.crc32 of every sample's stored bytes, (N,) uint32; (0,) if the sidecar has none."""
    try:
        return np.frombuffer(base64.b64decode(sidecar["crc32"], validate=True), "<u4")
    except (KeyError, TypeError, ValueError):
        return np.zeros(0, np.uint32)


def _seal(sidecar: dict[str, Any]) -> str:
    canonical = json.dumps(sidecar, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def is_sealed(path: Path, num_samples: int) -> bool:
    """Whether `path` is an undamaged sidecar of any data set of up to `num_samples` samples."""
    try:
        sidecar = _read(path, num_samples)
    except (OSError, ValueError, UserError):
        return False
    return isinstance(sidecar, dict) and sidecar.get("seal") == _seal({k: v for k, v in sidecar.items() if k != "seal"})
