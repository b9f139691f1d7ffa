"""Training and evaluation read tar shards as they read a beton file."""

import pytest

from fastdeit.distributed import world
from fastdeit.inputs import open_dataset
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.shard_writer import ShardWriter
from fastdeit.training.trainer import Trainer
from refusals import refused
from runs import evaluated, final_state, same_values, train, trained
from tiny_datasets import add_all


@pytest.fixture(scope="module")
def shards(data, tmp_path_factory):
    """The samples of `train.beton` and `val.beton`, in shards of 50 at most."""
    folder = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        with open_dataset(data / f"{split}.beton") as beton:
            with ShardWriter(folder / split, len(beton), shard_size=50) as writer:
                add_all(writer, beton)
                sidecar = writer.finish(class_names=beton.class_names)
            assert sidecar["content_hash"] == beton.content_hash
    return folder


@pytest.mark.slow
def test_the_weights_are_those_trained_on_the_beton(tiny, shards, events):
    on_beton = tiny()
    on_shards = tiny(
        data={"train": shards / "train", "val": shards / "val"}, run={"output": on_beton.run.output.with_name("shards")}
    )
    scores = [train(recipe) for recipe in (on_beton, on_shards)]
    beton, shard = (final_state(recipe) for recipe in (on_beton, on_shards))
    assert same_values(beton["model"], shard["model"])
    assert same_values(beton["ema"], shard["ema"])
    assert scores[0] == scores[1]
    losses = [[line["loss"] for line in events(r.run.output, "train")] for r in (on_beton, on_shards)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_checkpoint_of_the_beton_is_taken_up_on_the_shards(tiny, shards):
    whole = tiny()
    train(whole)
    half = tiny(run={"output": whole.run.output.with_name("half")})
    with world("cpu") as joined:
        trainer = Trainer(half, joined)
        trainer._save()
        trainer.close()
    rest = tiny(data={"train": shards / "train"}, run={"output": half.run.output})
    assert same_values(final_state(whole)["model"], trained(rest)["model"])


@pytest.mark.slow
def test_evaluation_reads_a_folder(teacher_checkpoint, data, shards):
    options = {"checkpoint": teacher_checkpoint, "loader": "torch", "device": "cpu", "threads": 2}
    on_beton, on_shards = (evaluated(val=path, **options) for path in (data / "val.beton", shards / "val"))
    assert on_beton["model"]["images"] == 44
    assert on_beton == on_shards


def test_what_is_no_data_set_is_said(tmp_path):
    refused(
        r"give --data\.train a folder of images, or what fastdeit-convert wrote", open_dataset, None, "--data.train"
    )
    with pytest.raises(UserError, match=r"--data\.train .*nowhere: there is no such file or folder"):
        open_dataset(tmp_path / "nowhere", "--data.train")
    refused(r"is not a data set of fastdeit-convert: it has no samples\.npy", open_dataset, tmp_path)
