"""Parquet files with an image column, like Hugging Face's data sets. Needs PyArrow."""

from __future__ import annotations

import bisect
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdeit.pipelines.errors import fact
from fastdeit.pipelines.parsing import parse_json
from fastdeit.pipelines.sources.base import MAX_FILE, SampleError, SourceError, check_stamp, class_number, stamp
from fastdeit.pipelines.sources.files import open_regular
from fastdeit.pipelines.sources.parquet_pages import PageError, check_footer, largest_page

CACHED = 2  # row groups in progress at a time
MAX_GROUP = 4 << 30  # bytes of a row group, decompressed
MAX_PAGE = 1 << 30  # bytes of a page, decompressed
BATCH = 64 << 20  # bytes of rows unpacked at once; at least one row
ROWS = 64  # unpacked at once, at most
SHOWN = 20  # columns in a message


class Parquet:
    """Rows of parquet files: an image file's bytes, and the number of its class.

    image  column of binary values, or of structs with a binary field `bytes`; None: the only such column
    label  column of integers; None: the only one that Hugging Face's schema calls a ClassLabel, else the only
           column of integers

    A label column may be floating point: tables with gaps store integers that way. `left_out` counts the files that
    were skipped for their names. Row groups are read forward: reading in order is fast, out of order slow. Raises
    SourceError for a damaged file, or one with another schema than the first.
    """

    in_memory = False

    def __init__(
        self,
        pattern: str,
        files: list[Path],
        class_names: list[str] | None = None,
        image: str | None = None,
        label: str | None = None,
        left_out: int = 0,
    ) -> None:
        self.pattern = pattern
        self._files = files
        self._stamps = [stamp(path) for path in files]
        self._groups: list[tuple[int, int, int]] = []  # file, row group in it, first row in it
        starts = [0]
        columns: tuple[str, str, str] | None = None
        names: list[str] | None = None
        for number, path in enumerate(files):
            _check_footer(path)
            file = _open(path)
            if file.metadata.num_rows > self._stamps[number][0]:
                raise SourceError(
                    f"{path}: declares {file.metadata.num_rows} rows in {self._stamps[number][0]} bytes, fewer than a "
                    f"byte a row. Fetch it again"
                )
            found = _columns(path, file.schema_arrow, image, label)
            own_names = _class_names(file.schema_arrow, found[2])
            if columns is None:
                columns, names = found, own_names
            elif (found, own_names) != (columns, names):
                raise SourceError(
                    f"{path}: its columns or class names differ from those of {files[0]}: give the files one by one"
                )
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
        self._left_out = left_out
        self._cursors: OrderedDict[int, _Cursor] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def _place(self, index: int) -> tuple[int, int]:
        """The row group of a sample, and the row in it."""
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
            "hidden_files": self._left_out,
        }

    def inputs(self) -> list[Path]:
        return self._files

    def read(self, index: int) -> tuple[bytes, int, str]:
        name = self.name(index)
        group, row = self._place(index)
        image, stored = self._row(group, row, name)
        if self._leaf != self._image and image.is_valid:
            image = image["bytes"]
        if not image.is_valid:
            raise SampleError(f"{name}: '{self._image}' holds no image's bytes")
        if (size := image.as_buffer().size) > MAX_FILE:
            raise SampleError(f"{name}: {size} bytes, but an image may have at most {MAX_FILE}. Remove it")
        label = stored.as_py()
        if label is None:
            raise SampleError(f"{name}: '{self._label}' holds no label")
        label = int(label) if isinstance(label, float) and label.is_integer() else label
        return image.as_py(), class_number(label, name, f"'{self._label}'"), name

    def _row(self, group: int, row: int, name: str) -> tuple[Any, Any]:
        """The values of both columns."""
        if group in self._cursors:
            self._cursors.move_to_end(group)
        cursor = self._cursors.get(group)
        if cursor is None or row < cursor.first:
            cursor = self._cursors[group] = self._cursor(group)
            while len(self._cursors) > CACHED:
                self._cursors.popitem(last=False)
        try:
            return cursor.row(row)
        except _GroupError as error:
            raise SampleError(f"{name}: row group {self._groups[group][1]} {error}. Fetch the file again") from error

    def _cursor(self, group: int) -> _Cursor:
        number, own, _ = self._groups[group]
        check_stamp(self._files[number], self._stamps[number])
        return _Cursor(self._files[number], own, (self._leaf, self._image, self._label))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cursors": OrderedDict()}


class _GroupError(ValueError):
    """A row group that cannot be read from some row on, and the reason."""


class _Cursor:
    """Reads a row group forward, a few rows at a time, in bounded memory.

    Encodings that store a repeated value once may unpack a kilobyte to gigabytes. A value is at most as large as the
    largest page, so a batch has as many rows as fit `BATCH` at that size.

    first  the first row that can still be read
    """

    def __init__(self, path: Path, group: int, columns: tuple[str, str, str]) -> None:
        self._path, self._group = path, group
        self._leaf, self._image, self._label = columns
        self._batches: Iterator[Any] | None = None
        self._batch: Any = None
        self._failed: str | None = None
        self.first = self._end = 0

    def row(self, row: int) -> tuple[Any, Any]:
        """The values of both columns in `row`, at or after `first`. Raises _GroupError."""
        import pyarrow

        while row >= self._end and self._failed is None:
            try:
                self._advance()
            except (MemoryError, SourceError):
                raise
            except StopIteration:
                self._failed = f"holds only {self._end} rows"
            except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
                self._failed = f"is damaged ({fact(error)})"
        if row >= self._end:
            raise _GroupError(self._failed)
        return self._batch.column(self._image)[row - self.first], self._batch.column(self._label)[row - self.first]

    def _advance(self) -> None:
        batches = self._batches = self._batches or self._open_batches()
        self._batch = None  # freed before the next one is unpacked
        self.first = self._end
        batch = next(batches)
        batch.validate(full=True)
        self._batch = batch
        self.first, self._end = self._end, self._end + batch.num_rows

    def _open_batches(self) -> Iterator[Any]:
        file = _open(self._path)
        rows = self._rows_at_once(file.metadata.row_group(self._group))
        columns = [self._leaf, self._label]
        return file.iter_batches(batch_size=rows, row_groups=[self._group], columns=columns, use_threads=False)

    def _rows_at_once(self, group: Any) -> int:
        largest = 1
        with open_regular(self._path) as file:
            for chunk in (group.column(i) for i in range(group.num_columns)):
                if chunk.path_in_schema not in (self._leaf, self._label):
                    continue
                start = chunk.data_page_offset
                if chunk.has_dictionary_page and 0 < (chunk.dictionary_page_offset or 0) < start:
                    start = chunk.dictionary_page_offset
                page = largest_page(file.fileno(), start, chunk.total_compressed_size, chunk.num_values)
                if page > MAX_PAGE:
                    raise ValueError(f"a page announces {page} bytes, and up to {MAX_PAGE} are read")
                largest = max(largest, page)
        return max(1, min(ROWS, BATCH // largest))


def _check_footer(path: Path) -> None:
    with open_regular(path) as file:
        try:
            check_footer(file.fileno())
        except PageError as error:
            raise SourceError(
                f"{path}: not a parquet file of images, or a damaged one ({error}). Fetch it again"
            ) from error


def _open(path: Path) -> Any:
    """The pyarrow.parquet.ParquetFile of `path`."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise SourceError(f"{path}: reading parquet needs PyArrow: pip install fastdeit[parquet]") from error
    open_regular(path).close()
    try:
        # With a buffer size, a column's stored bytes are read in pieces.
        file = ParquetFile(path, page_checksum_verification=True, buffer_size=1 << 20)
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
    """The leaf of the image column to read, and the names of the image and label columns."""
    from pyarrow import types

    binary = (types.is_binary, types.is_large_binary)

    def is_struct(kind: Any) -> bool:
        place = kind.get_field_index("bytes") if types.is_struct(kind) else -1
        return place >= 0 and any(is_kind(kind.field(place).type) for is_kind in binary)

    structs = [field.name for field in schema if is_struct(field.type)]
    images = structs or [field.name for field in schema if any(is_kind(field.type) for is_kind in binary)]
    labels = [field.name for field in schema if types.is_integer(field.type)]
    floats = [field.name for field in schema if types.is_floating(field.type)]
    classes = [name for name in labels if _feature(schema, name).get("_type") == "ClassLabel"]
    chosen = (
        _choose(path, schema, "image", images, images, image),
        _choose(path, schema, "label", classes or labels, labels + floats, label),
    )
    return (f"{chosen[0]}.bytes" if chosen[0] in structs else chosen[0], *chosen)


def _choose(path: Path, schema: Any, what: str, found: list[str], possible: list[str], asked: str | None) -> str:
    if asked is not None and asked in possible:
        return asked
    if asked is None and len(found) == 1:
        return found[0]
    columns = ", ".join(f"{field.name} ({field.type})" for field in itertools.islice(schema, SHOWN))
    columns += f" and {len(schema) - SHOWN} more" * (len(schema) > SHOWN)
    problem = f"'{asked}' is no {what} column" if asked else f"{len(found) or 'no'} {what} columns"
    raise SourceError(f"{path}: {problem}: name one with #{what}=COLUMN. Columns: {columns}")


def _feature(schema: Any, column: str) -> dict[str, Any]:
    """Hugging Face's metadata of a column; empty if there is none."""
    try:
        feature = parse_json(schema.metadata[b"huggingface"])["info"]["features"][column]
    except (TypeError, KeyError, ValueError):
        return {}
    return feature if isinstance(feature, dict) else {}


def _class_names(schema: Any, column: str) -> list[str] | None:
    names = _feature(schema, column).get("names")
    return names if isinstance(names, list) and names and all(isinstance(name, str) for name in names) else None
