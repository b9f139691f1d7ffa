"""A place for what a conversion writes."""

import pytest


@pytest.fixture
def out(tmp_path):
    """An empty folder in `tmp_path`."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"
