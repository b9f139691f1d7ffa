"""Atomic writing: the old file or all of the new one, nobody else's file; folders that cannot be synced."""

import os
from pathlib import Path

import pytest

from fastdeit.pipelines.formats.files import atomic_write, sync_folder
from refusals import refused


def test_the_file_is_the_old_one_until_all_of_the_new_one_is_written(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"old")

    def interrupted():
        with atomic_write(path) as file:
            file.write(b"ne")
            file.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b"old"
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_the_target_of_a_link_in_the_temporary_files_place_stays(tmp_path, link):
    other, path = tmp_path / "other", tmp_path / "x.json"
    other.write_bytes(b"somebody's")
    link(other, tmp_path / "x.json.tmp")
    with atomic_write(path, ".tmp") as file:
        file.write(b"new")
    assert other.read_bytes() == b"somebody's"
    assert path.read_bytes() == b"new"
    assert not path.is_symlink()


def test_what_a_killed_process_left_is_replaced(tmp_path):
    (tmp_path / "x.json.tmp").write_bytes(b"half of a much longer fi")
    with atomic_write(tmp_path / "x.json", ".tmp") as file:
        file.write(b"new")
    assert (tmp_path / "x.json").read_bytes() == b"new"


def test_a_folder_that_cannot_be_synced_is_no_error():
    """As under WSL, where each checkpoint in /mnt/c would fail; the judge is /proc, which refuses in the same way."""
    folder = os.open("/proc", os.O_RDONLY)
    try:
        refused("Invalid argument", os.fsync, folder, error=OSError)
    finally:
        os.close(folder)
    sync_folder(Path("/proc"))
