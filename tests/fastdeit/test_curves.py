"""Published curves: their figures beside those of the recipes' docstrings, and a run that falls behind."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from fastdeit.recipes import RECIPES, curves, deit3_small
from fastdeit.recipes.curves import band, curve, has_its_data
from fastdeit.training import reports
from runs import train

NAMES = [name for name in RECIPES if curve(name) and name.startswith("deit3_")]
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_curves_are_those_of_recipes_and_end_where_the_authors_tables_do():
    of_another_data_set = {n for n in RECIPES if n.endswith("_21k")}
    assert {n for n in RECIPES if curve(n)} - set(NAMES) == {"fashion_mnist_teacher", "fashion_mnist_distilled"}
    assert set(NAMES) == {n for n in RECIPES if n.startswith("deit3_")} - {"deit3_medium"} - of_another_data_set
    for name in NAMES:
        points = curve(name)
        assert [epoch for epoch, _ in points] == [*range(0, RECIPES[name]().run.epochs + 1, 5)]
        stated = re.search(r"^    Top-1: (\d+\.\d+) \(authors", RECIPES[name].__doc__, re.MULTILINE)
        if stated is not None:  # the tables have one decimal, and are of other runs
            assert points[-1][1] == pytest.approx(float(stated[1]), abs=0.15), name


def test_the_band_is_below_the_curve_and_holds_the_authors_other_sizes_at_epoch_10():
    for epoch in (5, 10, 20, 100, 800):
        expected, least = band("deit3_base", epoch)
        assert 0 <= least < expected
    sizes = [band(f"deit3_{size}", 10)[0] for size in ("small", "base", "large", "huge")]
    assert max(sizes) - min(sizes) < 2.2
    assert min(sizes) > band("deit3_base", 10)[1]
    assert band("deit3_small", 7.5)[0] == pytest.approx((2.008 + 9.258) / 2)
    assert band("deit_small", 10) is None


@pytest.mark.parametrize(
    ("name", "results", "first"),
    [("fashion_mnist_teacher", "teacher", 2), ("fashion_mnist_distilled", "student", 4)],
)
def test_curves_of_our_own_runs_are_those_of_the_results(name, results, first):
    lines = (RESULTS / f"fashion-mnist-{results}.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == "eval" and event["weights"] == "model"]
    points = [[event["epoch"] + 1, event["class"]["top1"]] for event in events]
    assert curve(name) == [point for point in points if point[0] >= first]
    assert points[-1][0] == RECIPES[name]().run.epochs
    assert band(name, first - 0.5) is None
    assert band(name, first)[1] == pytest.approx(curve(name)[0][1] - 4)


def test_sizes_of_data_sets():
    def is_imagenet(*sizes, **named):
        return has_its_data("deit_small", *sizes, **named)

    assert is_imagenet(1_281_167 // 2048 * 2048, 2048, 1000, 50_000)
    assert is_imagenet(1_281_167, 1024, None, 50_000)
    assert is_imagenet(1_281_167, 1024, None, None)
    assert has_its_data("fashion_mnist_teacher", 234 * 256, 256, 10, 10_000)
    assert not has_its_data("fashion_mnist_teacher", 23 * 256, 256, 10, 10_000)
    assert not has_its_data("fashion_mnist_teacher", 1_281_167, 1024, 1000, 50_000)
    for changes in ({"images": 1_000_000}, {"classes": 100}, {"validation": 10_000}, {"images": 1_290_000}):
        sizes = {"images": 1_281_000, "global_batch": 1024, "classes": 1000, "validation": 50_000, **changes}
        assert not is_imagenet(**sizes)


def test_a_run_of_another_network_is_not_compared(tiny, events, monkeypatch):
    named = dataclasses.replace(tiny(deit3_small), name="deit3_small")
    monkeypatch.setattr(curves, "_curves", lambda: {"deit3_small": [(0, 90.0), (2, 99.0)]})
    monkeypatch.setitem(RECIPES, "deit3_small", lambda: named)
    monkeypatch.setattr(reports, "has_its_data", lambda *sizes: True)
    smaller = dataclasses.replace(named, model=dataclasses.replace(named.model, depth=1))
    train(smaller)
    assert events(smaller.run.output, "pace") == []


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True])
def test_a_run_that_falls_behind_is_warned(tiny, events, monkeypatch, capsys, ahead):
    published = [(0, 0.0), (2, 0.1)] if ahead else [(0, 90.0), (2, 99.0)]
    recipe = dataclasses.replace(tiny(deit3_small), name="deit3_small")
    monkeypatch.setattr(curves, "_curves", lambda: {"deit3_small": published})
    monkeypatch.setitem(RECIPES, "deit3_small", lambda: recipe)
    monkeypatch.setattr(reports, "has_its_data", lambda *sizes: True)
    train(recipe)
    paces = events(recipe.run.output, "pace")
    assert [event["epoch"] for event in paces] == [0, 1]
    out = capsys.readouterr()
    said = out.out + out.err
    assert ("is below 90.5%; the authors' run of deit3_small had 94.5% there" in said) == (not ahead)


def test_a_run_on_other_data_is_not_compared(tiny, events):
    recipe = dataclasses.replace(tiny(deit3_small, run={"epochs": 1}), name="deit3_small")
    train(recipe)
    assert events(recipe.run.output, "pace") == []
