"""One folder of shards for the tests of its reader and its writer."""

import shutil

import pytest

from tiny_datasets import make_samples, write_shards


@pytest.fixture(scope="module")
def samples():
    return make_samples(11)


@pytest.fixture(scope="module")
def made_shards(samples, tmp_path_factory):
    """Eleven samples in shards of 3, 3, 3 and 2, for two nodes. Not to be changed."""
    return write_shards(tmp_path_factory.mktemp("shards") / "train", samples, shard_size=3, nodes=2)


@pytest.fixture
def own(made_shards, tmp_path):
    """A copy of `made_shards` that a test may change."""
    return shutil.copytree(made_shards, tmp_path / "train")
