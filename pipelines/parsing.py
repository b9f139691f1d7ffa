"""Parses untrusted JSON and TOML in bounded memory.

A parsed text takes up to 30 times its length, so its values are counted before it is parsed. The functions raise
ValueError with just the reason; callers add the file and the remedy.
"""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from fastdeit.pipelines.formats.files import read_text

MAX_JSON = 16 << 20  # bytes; the lists of class names and labels of real data sets take less than 1 MB
MAX_TOML = 64 << 10  # bytes; a recipe takes 3,000
MAX_DEPTH = 64  # levels of nested dicts and lists
_BYTES_OF_A_VALUE = 8  # a text may have one value for each 8 bytes of its limit
_FEW_VALUES = 1 << 18  # this many are allowed under any limit
_DIGITS = 100  # of an integer
_DOTS = 200  # in a line of TOML: the time for a dotted key grows with their square


def parse_json(text: str | bytes, most: int = MAX_JSON) -> Any:
    """The value of a JSON text of at most `most` bytes; bytes are UTF-8.

    Takes at most 15 times `most` bytes of memory. Raises ValueError if the text is longer or not JSON, has too many
    values, is nested too deeply, or holds an integer with too many digits.
    """
    if len(text) > most:
        raise ValueError(f"{len(text)} bytes, above the limit of {most}")
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    values, allowed = sum(map(text.count, "[{,:")), max(_FEW_VALUES, most // _BYTES_OF_A_VALUE)
    if values > allowed:
        raise ValueError(f"about {values} values, above the limit of {allowed}")
    try:
        value = json.loads(text.removeprefix("\ufeff"), parse_int=_integer)
    except RecursionError:
        raise _too_deep() from None
    _check_depth(value)
    return value


def read_json(path: Path, most: int = MAX_JSON) -> Any:
    """The value in a JSON file. Raises what `parse_json` and `files.open_regular` raise."""
    return parse_json(read_text(path, most), most)


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises ValueError as `parse_json` does."""
    if len(text) > MAX_TOML:
        raise ValueError(f"{len(text)} characters, above the limit of {MAX_TOML}")
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > _DOTS:
            raise ValueError(f"line {number} has more than {_DOTS} dots")
        if re.search(rf"[0-9A-Fa-f_]{{{_DIGITS + 1}}}", line):
            raise ValueError(f"line {number} has a number of more than {_DIGITS} digits")
    try:
        value = tomllib.loads(text)
    except RecursionError:
        raise _too_deep() from None
    _check_depth(value)
    return value


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits, above the limit of {_DIGITS}")
    return int(digits)


def _check_depth(value: Any) -> None:
    inside = [value]
    for _ in range(MAX_DEPTH + 1):
        outside = [v for v in inside if isinstance(v, dict | list)]
        if not outside:
            return
        inside = [v for held in outside for v in (held.values() if isinstance(held, dict) else held)]
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"nested more than {MAX_DEPTH} deep")
