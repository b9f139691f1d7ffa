"""`fastdeit budget` on the command line."""

import json

import pytest

from fastdeit.budget.plan import IMAGE_BYTES
from fastdeit.commands.budget import images_of, main, parse
from hostile import command


@pytest.fixture
def printed(capsys):
    """Function: what the command prints of these words."""

    def run(*words):
        command(main, *words)()
        return capsys.readouterr().out

    return run


def test_the_page_has_the_figures_of_the_forecast(printed):
    words = ["--gpus", 8, "--gpu", "NVIDIA H100 80GB HBM3", "--price", 2.5, "--deadline", 1000, "deit_base"]
    page = printed(*words)
    made = json.loads(printed(*words, "--json"))
    assert page.startswith("deit_base on 8 x H100, a forecast\n")
    assert f"{made['cost']:,.2f} at 2.5 a GPU and hour" in page
    assert f"{made['images_per_second']:,.0f} images/s" in page
    assert "1,281,167 x 300 epochs, 1,251 steps of 1,024 an epoch" in page
    assert "1000 hours: met; 1 H100 would do" in page
    assert made["gpus_for_deadline"] == 1
    assert all(len(line) < 130 for line in page.splitlines())


def test_a_batch_too_large_is_pointed_out(printed):
    words = ["--gpu", "rtx4090", "--gpus", 1, "deit_base", "--run.micro_batch", 1024]
    assert "of 24 GB a GPU at 1024 images at once: TOO MUCH" in printed(*words)


def test_fine_tuning_needs_no_weights_for_a_forecast(printed):
    assert "deit_base_384 on 8 x H100" in printed("deit_base_384")


def test_the_images_are_those_of_the_data_set(data, images):
    own, recipe = parse(["deit_tiny", "--data.train", f"{data}/train.beton", "--data.val", f"{data}/val.beton"])
    found = images_of(own, recipe)
    assert (found.train, found.val, found.classes) == (160, 44, 4)
    assert found.bytes * 160 == (data / "train.beton").stat().st_size
    own, recipe = parse(["--images", "99", "deit_tiny"])
    assert images_of(own, recipe).train == 99
    assert images_of(own, recipe).bytes == IMAGE_BYTES


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0", "deit_tiny"], "--gpus 0: give at least 1"),
        (["--price", "-1", "deit_tiny"], "--price -1: give a number above 0"),
        (["--deadline", "inf", "deit_tiny"], "--deadline inf: give a number above 0"),
        (["--gpu", "GH200", "deit_tiny"], "there is no card 'GH200' in the table: choose one of H200, H100"),
        (["deit_tiny", "--data.train", "none.beton"], "none.beton"),
        (["deit_huge"], "deit_huge"),
        ([], "name a recipe: deit_tiny, "),
    ],
)
def test_mistakes_are_told_in_a_sentence(ended, words, message):
    assert message in ended(2, command(main, *words)).err
