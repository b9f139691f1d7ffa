"""Reads the sizes of the pages in a parquet file from their headers, before anything is unpacked.

PyArrow unpacks whatever a page's header announces. Headers are Thrift's compact protocol
(https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md), their fields those of PageHeader in
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
"""

import os
from typing import Any

from fastdeit.pipelines.formats.bounds import most_unpacked

MAX_HEADER = 16 << 20  # bytes, as in PyArrow; a header may hold the smallest and the largest value
_FIRST = 1 << 10  # bytes read of a header at first
_MAX_DEPTH = 8  # of structures within structures; PageHeader has three
_UNPACKED, _STORED, _DATA, _DATA_V2 = 2, 3, 5, 8  # fields of PageHeader
_COUNT = 1  # field of its structures for data


class PageError(ValueError):
    """Bytes that are not a page header."""


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
    """Reads structures of integers and skips other values. Raises IndexError at the end of the bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

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
            raise PageError("structures too deep for a page's header")
        fields: dict[int, Any] = {}
        number = 0
        while head := self.byte():
            number = number + (head >> 4) if head >> 4 else self.integer()
            fields[number] = self.value(head & 15, depth)
        return fields

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
            case 12:
                return self.structure(depth + 1)
        raise PageError(f"a value of type {kind}, which no page's header has")
