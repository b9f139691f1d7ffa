"""Files leave the page cache when told to, also those that this process maps."""

import mmap
import os
import shutil

import pytest

from benchmarks.loaders.page_cache import evict, resident, warm
from system import run


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "one", tmp_path / "two", tmp_path / "empty"]
    for path, pages in zip(paths, (64, 3, 0), strict=True):
        path.write_bytes(os.urandom(pages * mmap.PAGESIZE))
        with open(path) as file:
            os.fsync(file.fileno())
    return paths


@pytest.fixture
def on_a_disk(files):
    evict(files)
    if resident(files) == 1.0:
        pytest.skip("this file system lies in memory")


def fincore(path):
    """Bytes of a file in the page cache as util-linux counts them."""
    return int(run("fincore", "-nbo", "RES", path, check=True).stdout)


def test_warm_files_are_resident_and_evicted_ones_are_not(files, on_a_disk):
    assert resident(files) == 0.0
    warm(files)
    assert resident(files) == 1.0
    evict(files[:1])
    assert resident(files[:1]) == 0.0
    assert resident(files) == 3 / 67


@pytest.mark.skipif(shutil.which("fincore") is None, reason="needs fincore of util-linux")
def test_fincore_agrees(files, on_a_disk):
    assert fincore(files[0]) == 0
    warm(files)
    assert fincore(files[0]) == 64 * mmap.PAGESIZE


def test_what_this_process_maps_is_evicted_and_readable_after(files, on_a_disk):
    contents = files[0].read_bytes()
    with open(files[0], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == contents
        evict(files)
        assert resident(files) == 0.0
        assert mapped[:] == contents


def test_no_files_are_not_resident():
    assert resident([]) == 0.0
