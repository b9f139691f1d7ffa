"""Reads the footer of a parquet file, and the sizes of its pages from their headers, before anything is unpacked.

PyArrow unpacks whatever size a page's header announces, and turns seven bytes of a footer into a kilobyte of memory.
Both are written in Thrift's compact protocol
(https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md), with the fields of PageHeader and
FileMetaData in https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
"""

import os
from typing import Any

from fastdeit.pipelines.formats.bounds import most_unpacked

MAX_HEADER = 16 << 20  # bytes, as in PyArrow; a header may hold the smallest and the largest value
_FIRST = 1 << 10  # bytes read of a header at first
MAX_FOOTER = 16 << 20  # bytes
MAX_STRUCTURES = 1 << 17  # in a footer; a row group of three columns takes about 20
_MAX_DEPTH = 8  # of structures within structures; PageHeader has three, FileMetaData six
_UNPACKED, _STORED, _DATA, _DATA_V2 = 2, 3, 5, 8  # fields of PageHeader
_COUNT = 1  # field of its structures for data
_SCHEMA, _GROUPS, _CHILDREN, _COLUMNS = 2, 4, 5, 1  # fields of FileMetaData, SchemaElement and RowGroup
_HIGHEST = 8  # the highest number of these fields; others are skipped


class PageError(ValueError):
    """Bytes that are not a page header or a footer."""


def check_footer(file: int) -> None:
    """Raise PageError if PyArrow would need too much memory for the footer, or if its columns do not match the schema.

    file  a descriptor. Whether it is a parquet file at all is left to PyArrow
    """
    end = os.fstat(file).st_size - 8
    tail = os.pread(file, 8, max(end, 0))
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or length > end:
        return
    if length > MAX_FOOTER:
        raise PageError(f"its footer has {length} bytes, but up to {MAX_FOOTER} are read")
    try:
        footer = _Compact(os.pread(file, length, end - length), MAX_STRUCTURES).structure()
    except IndexError as error:
        raise PageError("its footer ends within a structure") from error
    schema, groups = footer.get(_SCHEMA), footer.get(_GROUPS)
    if not isinstance(schema, list) or not isinstance(groups, list):
        raise PageError("its footer has no schema or no row groups")
    columns = sum(not element.get(_CHILDREN) for element in schema)
    for i, group in enumerate(groups):
        held = group.get(_COLUMNS)
        if not isinstance(held, list) or len(held) != columns:
            raise PageError(f"its row group {i} does not have the {columns} columns of the schema")


def largest_page(file: int, start: int, size: int, values: int) -> int:
    """Unpacked size of the largest page of a column chunk by the pages' headers, in bytes.

    file         a descriptor
    start, size  offset and size of the chunk in the file, bytes
    values       number of values in the chunk; later pages are not read

    Raises PageError for damaged headers, and for a page that unpacks to more than `most_unpacked`.
    """
    largest, at = 0, start
    while values > 0 and at < start + size:
        header, length = _read_header(file, at, start + size - at)
        unpacked, stored = header.get(_UNPACKED), header.get(_STORED)
        if type(unpacked) is not int or type(stored) is not int or unpacked < 0 or stored < 0:
            raise PageError(f"the page at byte {at} has no sizes")
        if unpacked > most_unpacked(stored):
            raise PageError(f"a page of {stored} bytes announces {unpacked}, more than images and labels unpack to")
        largest = max(largest, unpacked)
        data = header.get(_DATA) or header.get(_DATA_V2)
        if isinstance(data, dict):
            values -= max(int(data.get(_COUNT) or 0), 0)
        at += length + stored
    return largest


def _read_header(file: int, at: int, most: int) -> tuple[dict[int, Any], int]:
    """The fields of the header at byte `at`, by number, and its length."""
    wanted = _FIRST
    while True:
        data = os.pread(file, min(wanted, most, MAX_HEADER), at)
        reader = _Compact(data)
        try:
            return reader.structure(), reader.at
        except IndexError as error:
            if len(data) < wanted:
                raise PageError(f"the page at byte {at} has no whole header") from error
            wanted *= 16


class _Compact:
    """Reads structures of integers and skips other values. Raises IndexError at the end of the bytes.

    most  limit of the number of structures
    """

    def __init__(self, data: bytes, most: int = 16) -> None:
        self.data, self.at, self.left = data, 0, most

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise PageError("a number of more than 64 bits")

    def integer(self) -> int:
        value = self.varint()
        return value >> 1 ^ -(value & 1)

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise IndexError

    def structure(self, depth: int = 0) -> dict[int, Any]:
        if depth > _MAX_DEPTH:
            raise PageError("structures too deep for a parquet file")
        self.left -= 1
        if self.left < 0:
            raise PageError("more structures than a parquet file of images needs: write it with larger row groups")
        fields: dict[int, Any] = {}
        number = 0
        while head := self.byte():
            number = number + (head >> 4) if head >> 4 else self.integer()
            value = self.value(head & 15, depth)
            if 0 <= number <= _HIGHEST:
                fields[number] = value
        return fields

    def sequence(self, depth: int) -> list[Any] | None:
        """A list of structures; None in the place of other lists, which are skipped."""
        head = self.byte()
        count, kind = self.varint() if head >> 4 == 15 else head >> 4, head & 15
        if kind == 12:
            return [self.structure(depth + 1) for _ in range(count)]
        for _ in range(count):
            _ = self.skip(1) if kind in (1, 2) else self.value(kind, depth + 1)
        return None

    def value(self, kind: int, depth: int) -> Any:
        match kind:
            case 1 | 2:  # true and false, without bytes of their own
                return kind == 1
            case 3:
                return self.skip(1)
            case 4 | 5 | 6:
                return self.integer()
            case 7:
                return self.skip(8)
            case 8:
                return self.skip(self.varint())
            case 9:
                return self.sequence(depth + 1)
            case 12:
                return self.structure(depth + 1)
        raise PageError(f"a value of type {kind}, which no parquet file has")
