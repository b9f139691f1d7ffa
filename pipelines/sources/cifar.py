"""CIFAR-10 and CIFAR-100 in the archives that their authors distribute, pickled or binary."""

import io
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastdeit.pipelines.errors import fact
from fastdeit.pipelines.sources import tar
from fastdeit.pipelines.sources.base import SourceError, SplitNeededError, class_number

MAX_UNZIPPED = 200 << 20  # bytes; the archives hold 186 MB
MAX_WIDE = 1 << 20  # bytes of a text with characters beyond Latin-1, which Python may keep in four bytes each
_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_NARROW = bytes(range(0xC4))  # the bytes of Latin-1's characters in UTF-8
_FETCH = "Fetch the archive again"
_Batch = tuple[np.ndarray, list[Any]]  # pixels of every image, and labels as they are stored
_Files = dict[str, tuple[str, int, int]]  # by their last names: names in the archive, offsets and sizes
_TRAIN10 = [f"data_batch_{i}" for i in range(1, 6)]

# By a file that only this archive holds: the files of each split, the key of the labels, the key of the names.
_PICKLED = {
    "batches.meta": ({"train": _TRAIN10, "test": ["test_batch"]}, "labels", "label_names"),
    "meta": ({"train": ["train"], "test": ["test"]}, "fine_labels", "fine_label_names"),
}
# By such a file: the files of each split, and the label bytes before an image's pixels; the last one is the label.
_BINARY = {
    "batches.meta.txt": ({"train": [f"{name}.bin" for name in _TRAIN10], "test": ["test_batch.bin"]}, 1),
    "fine_label_names.txt": ({"train": ["train.bin"], "test": ["test.bin"]}, 2),
}


class Cifar:
    """Images of cifar-10 or cifar-100, -python.tar.gz or -binary.tar.gz, with CIFAR-100's fine labels.

    Format: https://www.cs.toronto.edu/~kriz/cifar.html. Unpickling runs no code that a pickle names.
    Raises SourceError for another archive, or a damaged one.
    """

    in_memory = True

    def __init__(self, path: Path, split: str | None = None, class_names: list[str] | None = None) -> None:
        self.path = path
        self.split = split
        if split not in ("train", "test"):
            raise SplitNeededError(f"{path}: choose --split train or --split test")
        self._archive = tar.Archive(path, MAX_UNZIPPED)
        members = tar.index(self._archive, str(path))
        files = {
            name.rpartition("/")[2]: (name, offset, size)
            for name, offset, size in zip(members.names, members.offset.tolist(), members.size.tolist(), strict=True)
        }
        batches, own_names = self._batches(files, split)
        del self._archive  # its content is in memory
        self._names = [name for name, _, _ in batches]
        self._starts = np.cumsum([0, *(len(label) for _, _, label in batches)])
        # Stored as colour planes.
        self._pixels = np.concatenate([p for _, p, _ in batches]).reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
        self._label = [value for _, _, label in batches for value in label]
        if not self._label:
            raise SourceError(f"{path}: no images in it. {_FETCH}")
        self.class_names = class_names or own_names

    def _batches(self, files: _Files, split: str) -> tuple[list[tuple[str, np.ndarray, list[Any]]], list[str]]:
        """File, pixels and labels of every batch; the names of the classes."""
        for sign, (splits, labels, names) in _PICKLED.items():
            if sign in files:
                batches = [(name, *_pickled_batch(*self._file(files, name), labels)) for name in splits[split]]
                return batches, _pickled_names(*self._file(files, sign), names)
        for sign, (splits, before) in _BINARY.items():
            if sign in files:
                batches = [(name, *_binary_batch(*self._file(files, name), before)) for name in splits[split]]
                return batches, self._file(files, sign)[1].decode("latin1").split()
        raise SourceError(f"{self.path}: not an archive of CIFAR-10 or CIFAR-100, python or binary version")

    def _file(self, files: _Files, name: str) -> tuple[str, bytes]:
        if name not in files:
            raise SourceError(f"{self.path}: holds no {name}. {_FETCH}")
        member, offset, size = files[name]
        return f"{self.path}:{member}", self._archive.read(offset, size)

    def __len__(self) -> int:
        return len(self._label)

    def inputs(self) -> list[Path]:
        return [self.path]

    def name(self, index: int) -> str:
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self.path}:{self._names[batch]}[{index - int(self._starts[batch])}]"

    def describe(self) -> dict[str, Any]:
        return {"kind": "cifar", "path": str(self.path), "split": self.split}

    def read(self, index: int) -> tuple[np.ndarray, int, str]:
        name = self.name(index)
        return self._pixels[index], class_number(self._label[index], name), name


def _binary_batch(where: str, data: bytes, before: int) -> _Batch:
    if len(data) % (before + _PIXELS):
        raise SourceError(f"{where}: {len(data)} bytes are not whole images of {before + _PIXELS}. {_FETCH}")
    rows = np.frombuffer(data, np.uint8).reshape(-1, before + _PIXELS)
    return rows[:, before:], rows[:, before - 1].tolist()


def _pickled_batch(where: str, data: bytes, labels: str) -> _Batch:
    batch = _unpickle(where, data)
    pixels, numbers = batch.get("data"), batch.get(labels)
    if not (isinstance(pixels, _Array) and isinstance(numbers, list)):
        raise SourceError(f"{where}: holds no 'data' and '{labels}' of their kinds. {_FETCH}")
    pixels = pixels.bytes()
    if pixels is None or len(pixels) != len(numbers) * _PIXELS:
        raise SourceError(f"{where}: its pixels are not those of {len(numbers)} images. {_FETCH}")
    return np.frombuffer(pixels, np.uint8).reshape(-1, _PIXELS), numbers


def _pickled_names(where: str, data: bytes, key: str) -> list[str]:
    names = _unpickle(where, data).get(key)
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise SourceError(f"{where}: holds no '{key}'. {_FETCH}")
    return names


class _Array:
    """Replaces numpy.ndarray in a pickle: keeps the state from which numpy would build an array."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def bytes(self) -> bytes | None:
        """The pixels; None if it is not an array of unsigned bytes in C order."""
        match self.state:
            case (_, tuple(), _Dtype(args=("u1", *_)), False | 0, data):
                # Of Python 2, a str that was read as latin1.
                data = data.encode("latin1") if isinstance(data, str) else data
                return data if isinstance(data, bytes) else None
        return None


class _Dtype:
    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None: ...


def _reconstruct(*_: Any) -> _Array:
    return _Array()


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}


# The one in C reserves as much memory as a file cares to name.
class _Unpickler(pickle._Unpickler):
    """Reads plain values and `_KNOWN` objects; the pickle's length bounds the memory."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._encoded: dict[str, bytes] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR batch needs")
        return _KNOWN[module, name]

    def _encode(self, text: str, encoding: str) -> bytes:
        """Bytes, as Python 3 pickles them for Python 2. A text that is encoded many times is stored once."""
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"bytes in {encoding}")
        if text not in self._encoded:
            self._encoded[text] = text.encode("latin1")
        return self._encoded[text]

    def _append_text(self, data: bytes) -> None:
        if len(data) > MAX_WIDE and data.translate(None, _NARROW):
            raise pickle.UnpicklingError(f"a text of {len(data)} bytes with characters beyond Latin-1")
        self.append(str(data, "utf-8", "surrogatepass"))  # pyright: ignore[reportAttributeAccessIssue]

    def load_binunicode(self) -> None:
        self._append_text(self.read(struct.unpack("<I", self.read(4))[0]))  # pyright: ignore[reportAttributeAccessIssue]

    def load_binunicode8(self) -> None:
        self._append_text(self.read(struct.unpack("<Q", self.read(8))[0]))  # pyright: ignore[reportAttributeAccessIssue]

    def load_build(self) -> None:
        # On other objects, it would set whatever attributes the pickle names.
        if not isinstance(self.stack[-2], _Array | _Dtype):  # pyright: ignore[reportAttributeAccessIssue]
            raise pickle.UnpicklingError("it sets attributes")
        super().load_build()  # pyright: ignore[reportAttributeAccessIssue]

    dispatch: ClassVar[dict[int, Any]] = {  # pyright: ignore[reportIncompatibleVariableOverride]
        **pickle._Unpickler.dispatch,
        pickle.BINUNICODE[0]: load_binunicode,
        pickle.BINUNICODE8[0]: load_binunicode8,
        pickle.BUILD[0]: load_build,
    }
    # A bytearray is allocated at any length that the file names; text with escapes occurs only in the oldest pickles.
    del dispatch[pickle.BYTEARRAY8[0]]
    del dispatch[pickle.UNICODE[0]]


def _unpickle(where: str, data: bytes) -> dict[Any, Any]:
    try:
        content = _Unpickler(data).load()
    # A damaged pickle raises whatever its opcodes trip over.
    except Exception as error:
        raise SourceError(f"{where}: not read as a pickle ({type(error).__name__}: {fact(error)}). {_FETCH}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{where}: holds no dictionary. {_FETCH}")
    return content
