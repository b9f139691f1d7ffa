"""Parquet files with an image column, as Hugging Face's data sets have them. Needs PyArrow."""

from __future__ import annotations

import bisect
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

from fastdeit.pipelines.errors import fact
from fastdeit.pipelines.sources.base import SampleError, SourceError, check_stamp, stamp

CACHED = 2  # row groups held at a time
MAX_GROUP = 4 << 30  # bytes of a row group, decompressed


class Parquet:
    """Rows of parquet files: an image file's bytes, and the number of its class.

    image  column of binary values, or of structs with a binary field `bytes`; None: the only such column
    label  column of integers; None: the only one that Hugging Face's schema calls a ClassLabel, else the only
           column of integers

    A row group is read at a time and the last two are kept, so reading in order is fast, and out of order slow.
    Raises SourceError for a file that is damaged, or of another schema than the first.
    """

    in_memory = False

    def __init__(
        self,
        pattern: str,
        files: list[Path],
        class_names: list[str] | None = None,
        image: str | None = None,
        label: str | None = None,
    ) -> None:
        self.pattern = pattern
        self._files = files
        self._stamps = [stamp(path) for path in files]
        self._groups: list[tuple[int, int, int]] = []  # file, row group in it, first row in it
        starts = [0]
        columns: tuple[str, str, str] | None = None
        names: list[str] | None = None
        for number, path in enumerate(files):
            file = _open(path)
            found = _columns(path, file.schema_arrow, image, label)
            own_names = _class_names(file.schema_arrow, found[2])
            if columns is None:
                columns, names = found, own_names
            elif (found, own_names) != (columns, names):
                raise SourceError(f"{path}: has other columns or class names than {files[0]}: give them one by one")
            row = 0
            for group in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                self._groups.append((number, group, row))
                row += rows
                starts.append(starts[-1] + rows)
        if columns is None or starts[-1] == 0:
            raise SourceError(f"{pattern}: no rows in it")
        self._leaf, self._image, self._label = columns
        self._starts = starts
        self.class_names = class_names or names
        self._cache: OrderedDict[int, tuple[Any, Any]] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the row group, and the row in it."""
        group = bisect.bisect_right(self._starts, index) - 1
        return group, index - self._starts[group]

    def name(self, index: int) -> str:
        group, row = self._place(index)
        number, _, first = self._groups[group]
        return f"{self._files[number]}[{first + row}]"

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "parquet",
            "path": self.pattern,
            "files": len(self._files),
            "image_column": self._image,
            "label_column": self._label,
        }

    def read(self, index: int) -> tuple[bytes, int, str]:
        name = self.name(index)
        group, row = self._place(index)
        images, labels = self._load(group, name)
        image, label = images[row].as_py(), labels[row].as_py()
        if isinstance(image, dict):
            image = image.get("bytes")
        if image is None:
            raise SampleError(f"{name}: '{self._image}' holds no image's bytes")
        if label is None:
            raise SampleError(f"{name}: '{self._label}' holds no label")
        return image, label, name

    def _load(self, group: int, name: str) -> tuple[Any, Any]:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        import pyarrow

        number, own, _ = self._groups[group]
        check_stamp(self._files[number], self._stamps[number])
        file = _open(self._files[number])
        expected = self._starts[group + 1] - self._starts[group]
        try:
            table = file.read_row_group(own, columns=[self._leaf, self._label], use_threads=False)
            columns = table.column(self._image), table.column(self._label)
            table.validate(full=True)
        except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
            raise SampleError(f"{name}: row group {own} is damaged ({fact(error)}). Fetch the file again") from error
        if len(table) != expected:
            raise SampleError(f"{name}: row group {own} holds {len(table)} rows, not {expected}. Fetch the file again")
        self._cache[group] = columns
        while len(self._cache) > CACHED:
            self._cache.popitem(last=False)
        return columns

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}


def _open(path: Path) -> Any:
    """The pyarrow.parquet.ParquetFile of `path`."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise SourceError(f"{path}: reading parquet needs PyArrow: pip install fastdeit[parquet]") from error
    try:
        file = ParquetFile(path, page_checksum_verification=True)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        _ = file.schema_arrow
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise SourceError(f"{path}: not a parquet file, or a damaged one ({fact(error)}). Fetch it again") from error
    for i, group in enumerate(groups):
        if group.num_rows < 0 or not 0 <= group.total_byte_size <= MAX_GROUP:
            raise SourceError(
                f"{path}: row group {i} declares {group.num_rows} rows and {group.total_byte_size} bytes, and up to "
                f"{MAX_GROUP} are read. Write the file with smaller row groups"
            )
    return file


def _columns(path: Path, schema: Any, image: str | None, label: str | None) -> tuple[str, str, str]:
    """What to read of the image column, its name, and the label column's."""
    from pyarrow import types

    binary = (types.is_binary, types.is_large_binary)

    def is_struct(kind: Any) -> bool:
        place = kind.get_field_index("bytes") if types.is_struct(kind) else -1
        return place >= 0 and any(is_kind(kind.field(place).type) for is_kind in binary)

    structs = [field.name for field in schema if is_struct(field.type)]
    images = structs or [field.name for field in schema if any(is_kind(field.type) for is_kind in binary)]
    labels = [field.name for field in schema if types.is_integer(field.type)]
    classes = [name for name in labels if _feature(schema, name).get("_type") == "ClassLabel"]
    chosen = (
        _choose(path, schema, "image", images, images, image),
        _choose(path, schema, "label", classes or labels, labels, label),
    )
    return (f"{chosen[0]}.bytes" if chosen[0] in structs else chosen[0], *chosen)


def _choose(path: Path, schema: Any, what: str, found: list[str], possible: list[str], asked: str | None) -> str:
    if asked is not None and asked in possible:
        return asked
    if asked is None and len(found) == 1:
        return found[0]
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    problem = f"'{asked}' is no {what} column" if asked else f"{len(found) or 'no'} {what} columns"
    raise SourceError(f"{path}: {problem}: name one with #{what}=COLUMN. Columns: {columns}")


def _feature(schema: Any, column: str) -> dict[str, Any]:
    """What Hugging Face's metadata says of a column; empty where it says nothing."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]
    except (TypeError, KeyError, ValueError, RecursionError):
        return {}
    return feature if isinstance(feature, dict) else {}


def _class_names(schema: Any, column: str) -> list[str] | None:
    names = _feature(schema, column).get("names")
    return names if isinstance(names, list) and names and all(isinstance(name, str) for name in names) else None
