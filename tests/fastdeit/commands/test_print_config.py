"""`--print-config` and the short help: what a run would be, and the fields that people change first."""

import json
import re

import pytest

from fastdeit.cli import parse_recipe
from fastdeit.commands.print_config import print_config
from fastdeit.help import FIRST, page
from fastdeit.recipes import RECIPES
from system import run_python


def printed(recipe, capsys):
    print_config(recipe)
    return capsys.readouterr()


def test_what_it_prints_is_the_same_recipe_again(tmp_path, capsys):
    recipe = parse_recipe(
        ["deit_small_distilled", "--optim.lr", "1e-3", "--teacher.labels", "x", "--run.device", "cpu"]
    ).resolved()
    out, err = printed(recipe, capsys)
    (tmp_path / "run.json").write_text(out)
    again = parse_recipe(["--config", str(tmp_path / "run.json")]).resolved()
    assert again == recipe
    assert printed(again, capsys).out == out
    assert "differs from deit_small_distilled: " in err
    assert "optim.lr 0.001 (not 0.0005)" in err


def test_auto_becomes_what_runs_here(tiny, capsys):
    recipe = tiny(data={"loader": "auto"})
    err = printed(recipe, capsys).err
    assert "device cpu, precision fp32" in err
    assert re.search("loader (torch|turbo|dali): ", err)
    assert "augmentation on the host" in err
    assert "CUDA graphs off: there is no GPU" in err
    assert not recipe.run.output.exists()


def test_a_recipe_that_nothing_changed(capsys):
    out, err = printed(parse_recipe(["deit_tiny", "--run.device", "cpu"]).resolved(), capsys)
    assert json.loads(out)["name"] == "deit_tiny"
    assert "differs from deit_tiny: run.device cpu (not auto)" in err
    assert "give --data.train" in err


@pytest.mark.parametrize("name", RECIPES)
def test_the_short_page_fits_a_screen(name):
    lines = page(RECIPES[name](), "Purpose.", "fastdeit train").splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 120
    assert all(any(f"--{field.name} " in line for line in lines) for field in FIRST)


def test_the_short_page_depends_on_the_recipe():
    scaled, fixed, grows = (
        page(RECIPES[name](), "", "") for name in ("deit_tiny", "deit3_small", "deit_tiny_curriculum")
    )
    assert "scales with run.global_batch" in scaled
    assert "for a batch of 2048; does not scale" in fixed
    assert "--curriculum.sizes    96, ..., 224" in grows
    assert "--curriculum.sizes" not in fixed


@pytest.mark.slow
def test_help_and_help_all():
    short = run_python("-m", "fastdeit.train", "deit_small", "--help").stdout
    whole = run_python("-m", "fastdeit.train", "deit_small", "--help-all").stdout
    assert short.startswith("usage: fastdeit-train deit_small ")
    assert "--departures.mix_group" not in short
    assert "--departures.mix_group" in whole
    assert len(whole.splitlines()) > 10 * len(short.splitlines())
