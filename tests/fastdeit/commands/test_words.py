"""The words of a command line: homes, empty values, what no path can hold, and batches that cannot be mixed."""

import os
import pwd
import re
from pathlib import Path

import pytest

from fastdeit.cli import parse, parse_recipe, words
from fastdeit.commands import convert
from fastdeit.commands import eval as evaluate
from fastdeit.commands.label import parse as parse_label
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.sources import open_source
from refusals import refused
from runs import parse_file

OTHER = pwd.getpwuid(os.getuid()).pw_name


@pytest.fixture
def home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("~", "/home/me"),
        ("~/x", "/home/me/x"),
        ("--run.output=~/x", "--run.output=/home/me/x"),
        ("imagenet:~/x#labels=~/y", "imagenet:/home/me/x#labels=/home/me/y"),
        ("torchvision:CIFAR10:~/x:train", "torchvision:CIFAR10:/home/me/x:train"),
        ("webdataset:~/{000..127}.tar", "webdataset:/home/me/{000..127}.tar"),
        (f"~{OTHER}/x", f"{pwd.getpwnam(OTHER).pw_dir}/x"),
        ("/data/~/x", "/data/~/x"),
        ("/data/x~", "/data/x~"),
        ("rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1"),
    ],
)
def test_homes(home, word, meant):
    assert words([word]) == [meant]


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_homes_in_a_file(home, tmp_path, suffix):
    file = tmp_path / f"run{suffix}"
    values = {"name": "deit_tiny", "run": {"output": "~/out"}, "data": {"train": "~/train.beton"}}
    tables = '[run]\noutput = "~/out"\n[data]\ntrain = "~/train.beton"\n'
    content = values if suffix == ".json" else f'name = "deit_tiny"\n{tables}'
    recipe = parse_file(file, content, "--model.init=~/w.pt", "--run.resume", "~/c.pt")
    assert recipe.run.output == Path("/home/me/out")
    assert recipe.data.train == Path("/home/me/train.beton")
    assert recipe.model.init == Path("/home/me/w.pt")
    assert recipe.run.resume == "/home/me/c.pt"


def test_homes_of_the_other_commands(home, monkeypatch):
    assert parse(evaluate.Options, "eval", ["~/w.pt", "~/val"]).checkpoint == Path("/home/me/w.pt")
    given = parse(convert.Options, "convert", ["~/images", "~/x.beton", "--class-names=~/names"])
    assert (given.source, given.dest) == ("/home/me/images", Path("/home/me/x.beton"))
    assert given.class_names == Path("/home/me/names")
    _, recipe = parse_label(["deit_tiny_distilled", "--teacher.labels=~/labels"])
    assert recipe.teacher.labels == Path("/home/me/labels")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--run.output", ""], "the value of --run.output is empty"),
        (["--run.output="], "the value of --run.output is empty"),
        ([""], "the value is empty"),
        (["--data.train=~nosuchuser/x"], "~nosuchuser in --data.train=~nosuchuser/x: no such user here"),
        (["--data.train", "a\0b"], "zero byte"),
        (["--data.train", "a\ud800"], "UTF-8"),
    ],
)
def test_what_is_no_value(args, said):
    refused(re.escape(said), words, args)


@pytest.mark.parametrize("held", ["a\0b", "a\ud800", ""])
def test_what_is_no_path_in_a_file(tmp_path, held):
    refused(r"--data\.train", parse_file, tmp_path / "run.json", {"name": "deit_tiny", "data": {"train": held}})


@pytest.mark.parametrize("name", ["a#b", "#", "x#y,z"])
def test_a_hash_in_a_path(images, tmp_path, name):
    """Before it stood for the options of a source, wherever it was."""
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/{name}/none.tar: there is no such")):
        open_source(f"webdataset:{tmp_path}/{name}/none.tar#label=cls")
    (tmp_path / name / "ILSVRC2012_img_val.tar").write_bytes(b"")
    (tmp_path / name / "truth").write_text("no wnid")
    (tmp_path / name / "x#1.tar").write_bytes(b"no archive")
    refused(re.escape(f"{tmp_path}/{name}/x#1.tar: "), open_source, f"webdataset:{tmp_path}/{name}/x#1.tar")
    refused("unknown option 'lable=x'", open_source, f"webdataset:{tmp_path}/{name}/x#1.tar#lable=x")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/{name}/truth, image 1: 'no wnid'")):
        open_source(f"imagenet:{tmp_path}/{name}/ILSVRC2012_img_val.tar#labels={tmp_path}/{name}/truth")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--run.global-batch", "100"], r"^run\.global_batch is 100.*set --run\.global_batch 64 or 128"),
        (["--run.global-batch", "33"], r"^run\.global_batch is 33.*set an even --run\.global_batch"),
        (["--run.global-batch", "1"], r"^run\.global_batch is 1,"),
        (["--run.global-batch", "33", "--compat", "released"], r"^run\.global_batch is 33"),
        (["--run.global-batch", "66", "--departures.mix-group", "33"], r"^departures\.mix_group is 33"),
        (["--departures.mix-group", "-2"], r"^departures\.mix_group is -2"),
    ],
)
def test_batches_that_cannot_be_mixed(args, said):
    with pytest.raises(UserError, match=said):
        parse_recipe(["deit_tiny", *args]).resolved()


def test_an_odd_batch_without_mixing():
    odd = ["--run.global-batch", "33", "--augment.mix-prob", "0"]
    assert parse_recipe(["deit_tiny", *odd]).resolved().run.global_batch == 33
