"""The study of the papers' claims: its cells, its statistics against scipy's, and a run of it."""

import json
import statistics

import pytest
from scipy import stats

from benchmarks.findings import benchmark
from benchmarks.findings.cells import CELLS, CLAIMS, Study, recipe
from benchmarks.findings.report import BEGIN, END, by_cell, draw, findings, write
from benchmarks.record import RESULTS
from fastdeit.effects import check_given
from fastdeit.pipelines.errors import UserError


@pytest.fixture
def study(tmp_path):
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return Study(
        train=tmp_path / "train.beton",
        val=tmp_path / "val.beton",
        teacher=tmp_path / "teacher.pt",
        teacher_arch="resnet10t",
        epochs=12,
        model=shape,
        augment={"hflip": 0.0},
        sizes=(16, 16, 24, 24, 32, 32),
        transformer=tmp_path / "transformer.pt",
    )


def test_every_cell_is_a_recipe_whose_changes_have_an_effect(study, tmp_path):
    for cell in CELLS:
        made = recipe(study, cell, 3, tmp_path / "run").resolved()
        base = recipe(study, "deit 3" if CELLS[cell][0] == "deit3" else "deit", 3, tmp_path / "run").resolved()
        check_given(made, base)
        assert (made.name == base.name) or made != base
        assert made.run.seed == 3


def test_small_images_first_take_the_computation_of_half_the_epochs(study, tmp_path):
    parts = recipe(study._replace(epochs=40), "small images first", 0, tmp_path).resolved().parts()
    assert parts.epochs == 45
    assert sum(parts.work(epoch) for epoch in range(45)) == pytest.approx(20, rel=0.03)


def test_runs_of_earlier_versions_need_not_be_repeated(study, tmp_path):
    """The hashes of the study's settings are those in the results."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2}
    augment = {"hflip": 0.0, "crop_scale": (0.6, 1.0), "crop_ratio": (0.85, 1.18), "eval_crop": 1.0}
    digits = study._replace(epochs=40, model=shape, augment=augment)
    lines = (RESULTS / "findings.jsonl").read_text().splitlines()
    held = {record["cell"]: record["settings"] for record in map(json.loads, lines) if record["data"] == "digits"}
    for cell, settings in held.items():
        assert benchmark.settings(recipe(digits, cell, 0, tmp_path)) == settings


def test_every_claim_compares_two_cells_of_the_study():
    for claim in CLAIMS:
        assert {claim.cell, claim.control} <= CELLS.keys()
        sides = [
            (claim.cell, claim.cell_head, claim.cell_weights),
            (claim.control, claim.control_head, claim.control_weights),
        ]
        assert sides[0] != sides[1]


def records(first, second, cells=("hard, class token", "deit")):
    def scores(value):
        return {weights: {"class": {"top1": value}} for weights in ("model", "ema")}

    return [
        {"data": "digits", "cell": cell, "seed": seed, "scores": scores(value)}
        for cell, values in zip(cells, (first, second), strict=True)
        for seed, value in enumerate(values)
    ]


def finding(found, text="hard distillation beats none"):
    [one] = [each for each in found if each.claim.text == text]
    return one


def test_differences_are_paired_by_seed():
    first, second = [60.0, 62.0, 61.0, 66.0], [58.0, 61.0, 57.0]
    one = finding(findings(by_cell(records(first, second), "digits")))
    assert one.differences == (2.0, 1.0, 4.0)
    judge = stats.ttest_rel(first[:3], second)
    assert one.p == pytest.approx(judge.pvalue)
    low, high = judge.confidence_interval(0.95)
    assert one.mean == pytest.approx(statistics.mean((low, high)))
    assert one.spread == pytest.approx((high - low) / 2)
    assert one.verdict == "not shown"


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ([60.0, 61.0, 62.0], [50.0, 50.9, 52.2], "holds"),
        ([50.0, 50.9, 52.2], [60.0, 61.0, 62.0], "**the opposite**"),
        ([60.0, 61.0], [50.0, 51.1], "too few seeds"),
    ],
)
def test_verdicts(first, second, verdict):
    found = findings(by_cell(records(first, second), "digits"))
    assert finding(found).verdict == verdict
    average = finding(found, "the average of the weights helps")  # here it is equal to the weights
    assert (average.verdict == "not shown") == (len(first) > 2)


def test_the_page_is_replaced_between_its_marks(tmp_path):
    page = tmp_path / "findings.md"
    page.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    for _ in range(2):
        write(records([60.0, 61.0, 62.0], [50.0, 50.9, 52.2]), page)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert text.count("| hard distillation beats none | arXiv 2012.12877, Table 3 | +9.97 +- ") == 1
    assert "stale" not in text
    assert (tmp_path / "images" / "findings.svg").read_text().startswith("<?xml")
    page.write_text("no marks")
    with pytest.raises(UserError, match="lacks the lines"):
        write(records([60.0], [50.0]), page)


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_interrupted(tmp_path, capsys):
    words = ["--epochs", "1", "--folder", str(tmp_path), "--results", str(tmp_path / "found.jsonl")]
    cells = ["--cells", "hard, distillation token", "deit 3"]
    benchmark.main([*words, *cells[:2], "--seeds", "1"])
    benchmark.main([*words, *cells, "--seeds", "1"])
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [(line["cell"], line["seed"]) for line in lines] == [("hard, distillation token", 0), ("deit 3", 0)]
    assert lines[0]["scores"].keys() == {"model", "ema", "cosines"}
    assert len(lines[0]["scores"]["cosines"]) == 5
    assert not [*(tmp_path / "digits").glob("run-*")]
    with pytest.raises(UserError, match="there is no cell 'deti'"):
        benchmark.main(["--cells", "deti"])
    with pytest.raises(UserError, match="needs --train and --val"):
        benchmark.main(["--data", "fashion-mnist"])


def test_points_stand_beside_their_claims_where_a_data_set_lacks_one(tmp_path, monkeypatch):
    """Both panels of the picture share the labels of the left one."""
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    digits = findings(by_cell(records([60.0, 61.0, 62.0], [50.0, 50.9, 52.2]), "digits"))
    assert len(digits) == 2
    found = {"digits": digits, "few": [finding(digits)], "other": digits[1:]}
    draw(found, tmp_path / "x.svg")
    left = figures[0].axes[0]
    names = dict(zip(left.get_yticks(), (label.get_text() for label in left.get_yticklabels()), strict=True))
    for panel, chosen in zip(figures[0].axes, found.values(), strict=True):
        points = [line.get_xydata()[0] for line in panel.get_lines() if line.get_marker() == "o"]
        assert {names[y]: x for x, y in points} == {each.claim.text: pytest.approx(each.mean) for each in chosen}
