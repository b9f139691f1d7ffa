"""`fastdeit budget` on the command line."""

import json
import sys

import pytest

from fastdeit.budget.plan import IMAGE_BYTES
from fastdeit.commands import budget
from fastdeit.commands.budget import images_of, main, parse


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["fastdeit budget", *map(str, words)])
    main()
    return capsys.readouterr().out


def test_the_page_has_the_figures_of_the_forecast(monkeypatch, capsys):
    words = ["--gpus", 8, "--gpu", "NVIDIA H100 80GB HBM3", "--price", 2.5, "--deadline", 1000, "deit_base"]
    page = command(monkeypatch, capsys, *words)
    made = json.loads(command(monkeypatch, capsys, *words, "--json"))
    assert page.startswith("deit_base on 8 x H100, a forecast\n")
    assert f"{made['cost']:,.2f} at 2.5 a GPU and hour" in page
    assert f"{made['images_per_second']:,.0f} images/s" in page
    assert "1,281,167 x 300 epochs, 1,251 steps of 1,024 an epoch" in page
    assert "1000 hours: met; 1 H100 would do" in page
    assert made["gpus_for_deadline"] == 1
    assert all(len(line) < 130 for line in page.splitlines())


def test_a_batch_too_large_is_pointed_out(monkeypatch, capsys):
    words = ["--gpu", "rtx4090", "--gpus", 1, "deit_base", "--run.micro_batch", 1024]
    assert "of 24 GB a GPU at 1024 images at once: TOO MUCH" in command(monkeypatch, capsys, *words)


def test_fine_tuning_needs_no_weights_for_a_forecast(monkeypatch, capsys):
    assert "deit_base_384 on 8 x H100" in command(monkeypatch, capsys, "deit_base_384")


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
def test_mistakes_are_told_in_a_sentence(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["fastdeit budget", *words])
    with pytest.raises(SystemExit) as stop:
        budget.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
