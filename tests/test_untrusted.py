"""Every reader of untrusted files goes through the functions that limit what they may take."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fastdeit", "pipelines", "kernels", "benchmarks")
# Each pattern, the files that may hold it, and what to use in the others.
BOUNDED = {
    # Our own values that go through JSON are trusted.
    r"\bjson\.loads?\((?!json\.dumps\()": ({"pipelines/parsing.py"}, "parsing"),
    r"\btomllib\.": ({"pipelines/parsing.py"}, "parsing"),
    r"\bnp\.(load|loadtxt|genfromtxt|fromfile|memmap)\(|read_array_header|format\.read": (
        {"pipelines/formats/bounds.py", "pipelines/formats/shards.py"},
        "formats.bounds",
    ),
    r"\bZipFile\((?!BoundedReads\()": (set(), "zipfile.ZipFile(BoundedReads(...)) of formats.bounds"),
    r"\bpickle\.loads?\(|\bshelve\.|\bmarshal\.": (set(), "JSON"),
    r"\btorch\.load\(": ({"fastdeit/checkpoint.py"}, "checkpoint.read_checkpoint"),
    r"\b(gzip|bz2|lzma)\.(open|decompress)\(|\bdecompressobj\(|\btarfile\.open\((?!path, \"w\")": (
        {"pipelines/sources/tar.py", "pipelines/sources/idx.py", "pipelines/sources/imagenet.py"},
        "formats.bounds.most_unpacked",
    ),
    r"\bloadmat\(": ({"pipelines/sources/imagenet.py"}, "JSON"),
    r"\bParquetFile\(": ({"pipelines/sources/parquet.py"}, "sources.parquet, which checks the footer first"),
    r"\byaml\.|\bElementTree\b|(?<![.\w])(eval|exec)\(": (set(), "JSON"),
}


def code():
    """Name and code of every file."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            yield str(path.relative_to(ROOT)), path.read_text()


@pytest.mark.parametrize("pattern", BOUNDED)
def test_no_reader_is_unbounded(pattern):
    allowed, instead = BOUNDED[pattern]
    found = {
        f"{name}:{number}"
        for name, text in code()
        if name not in allowed
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line.partition("  #")[0])
    }
    assert not found, f"use {instead}"


def test_every_command_escapes_its_output():
    """Each has a `main` that goes through `cli.run`, or calls `escape_streams` itself."""
    for path in (ROOT / "fastdeit" / "commands").glob("*.py"):
        text = path.read_text()
        if "def main(" in text:
            assert re.search(r"\brun\(|\bescape_streams\(", text), path
