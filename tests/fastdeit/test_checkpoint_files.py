"""A run's folder in the place of a checkpoint."""

import pytest

from fastdeit.inputs import with_checkpoint_files
from fastdeit.pipelines.errors import UserError
from runs import changed


@pytest.fixture
def folder(tmp_path):
    checkpoints = tmp_path / "earlier" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for name in ("checkpoint-000000009.pt", "checkpoint-000000010.pt", "checkpoint-000000011.pt.tmp", "best.pt"):
        (checkpoints / name).write_bytes(b"")
    return tmp_path / "earlier"


def test_the_newest_checkpoint_of_a_folder_is_taken(tiny, folder):
    newest = folder / "checkpoints" / "checkpoint-000000010.pt"
    given = {"model": {"init": folder}, "teacher": {"checkpoint": folder}, "run": {"resume": str(folder)}}
    found = with_checkpoint_files(changed(tiny(), **given))
    assert (found.model.init, found.teacher.checkpoint, found.run.resume) == (newest, newest, str(newest))
    assert with_checkpoint_files(found) == found
    assert with_checkpoint_files(tiny()) == tiny()


@pytest.mark.parametrize(("section", "field"), [("model", "init"), ("teacher", "checkpoint"), ("run", "resume")])
def test_a_folder_without_checkpoints_is_named_with_its_option(tiny, tmp_path, section, field):
    value = str(tmp_path) if field == "resume" else tmp_path
    with pytest.raises(UserError, match=rf"--{section}\.{field} .* is a folder without checkpoints"):
        with_checkpoint_files(changed(tiny(), **{section: {field: value}}))
