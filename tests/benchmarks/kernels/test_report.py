"""Made-up records of kernels as text, as Markdown and as a picture."""

import pytest
from PIL import Image

from benchmarks import tables
from benchmarks.kernels.report import record_table, targets
from benchmarks.render import target_lines
from refusals import refused

ENVIRONMENT = {
    "date": "2026-01-01T00:00",
    "command": "python -m benchmarks kernels",
    "commit": "0123456789abcdef",
    "gpu": {"name": "NVIDIA H200", "driver": "580.95"},
    "versions": {"torch": "2.11.0", "timm": "1.0.31", "triton": "3.6.0"},
}
COMMON = {"benchmark": "kernels", "batch": 256, "refused": {}, "failed": {}, "absent": {}, "environment": ENVIRONMENT}
COMMON["roof"] = {"bytes_per_second": 4.3e12, "flops_per_second": 790e12}


def model_record(op, milliseconds, *, graph=True, model="base", tokens=198, **changes):
    """Sides by name: milliseconds of forward and backward; of both floors 0.1."""
    sides = {}
    for name, both in milliseconds.items():
        figures = {"ms": both + 0.05, "windows": [both + 0.05] * 5, "share_of_roof": 0.1 / both}
        figures |= {"graph_ms": both, "graph_windows": [both] * 5} if graph else {}
        sides[name] = {"forward": figures, "both": figures}
    shape = {} if op == "distillation_loss" else {"model": model, "tokens": tokens}
    return {**COMMON, "op": op, **shape, "floor_ms": {"forward": 0.1, "both": 0.1}, "sides": sides, **changes}


def pass_record(name, milliseconds, floor=0.5, **changes):
    sides = {}
    for side, ms in milliseconds.items():
        sides[side] = {"ms": ms, "windows": [ms] * 5, "images_per_second": 256e3 / ms, "times_floor": ms / floor}
    return {**COMMON, "op": "augment", "pass": name, "size": 224, "floor_ms": floor, "sides": sides, **changes}


RECORDS = [
    model_record("attention", {"fastdeit": 0.2, "sdpa flash": 0.3, "sdpa cudnn": 0.25, "eager": 0.3}),
    model_record("attention", {"eager": 0.3}, tokens=578, refused={"fastdeit": "output 0: error 1e0"}),
    model_record("assemble_tokens", {"fastdeit": 0.11, "eager": 0.4}, graph=False),
    model_record("distillation_loss", {"fastdeit": 0.05, "eager": 0.2, "compiled": 0.1}),
    pass_record("resize", {"fastdeit": 2.0, "torchvision": 20.0}),
    pass_record("augment", {"fastdeit": 2.0, "kornia": 50.0}, absent={"DALI": "pip install nvidia-dali-cuda120"}),
    {**COMMON, "op": "augment", "size": 224, "sides": {}, "refused": {"fastdeit": "3 of 4 samples differ"}, "batch": 4},
]


def test_the_issues_targets_are_judged():
    judged = [[(target["text"], target["reached"]) for target in targets(record)] for record in RECORDS]
    assert judged == [
        [("faster than the best SDPA backend: 1.25x of at least 1.20x", True)],
        [],
        [
            ("of the copy's bandwidth, forward: 91% of at least 85%", True),
            ("of it, with backward: 91% of at least 85%", True),
        ],
        [
            ("faster than eager, launched call by call: 2.50x of at least 5.00x", False),
            ("faster than compiled, launched call by call: 1.50x of at least 1.50x", True),
        ],
        [("128,000 im/s of at least 100,000", True)],
        [("4.00x the floor, at most 3x", False), ("128,000 im/s of at least 150,000", False)],
        [],
    ]


def report(record):
    return "\n".join([record_table(record).text(), *target_lines(targets(record))])


def test_the_terminal_shows_the_fastest_first_and_what_was_not_timed():
    text = report(RECORDS[0])
    assert text.splitlines()[0] == "attention base N198, batch 256: floor 0.100 ms forward, 0.100 ms with backward"
    assert [line.split()[0] for line in text.splitlines()[2:6]] == ["fastdeit", "sdpa", "sdpa", "eager"]
    assert text.splitlines()[1].endswith("ours is faster")
    assert text.splitlines()[5].endswith("  1.50")
    assert "target reached: faster than the best SDPA" in text
    assert "fastdeit: refused: output 0: error 1e0" in report(RECORDS[1])
    assert "0.160         -" in report(RECORDS[2])
    assert "target MISSED: 4.00x the floor" in report(RECORDS[5])
    quick = pass_record("augment", {"fastdeit": 2.0})
    quick["sides"]["fastdeit"] |= {"graph_ms": 1.25, "times_floor": 2.5}
    assert "2.000 (1.250 in a graph)" in report(quick)
    assert "| augment | fastdeit | 2.000 (1.250 in a graph) | 2.50 | 128,000 |  |" in tables.markdown([quick])
    assert "DALI: absent: pip install" in report(RECORDS[5])
    assert "fastdeit: refused: 3 of 4" in report(RECORDS[6])


def test_markdown_has_a_table_an_operation():
    text = tables.markdown(RECORDS)
    assert "### Kernels, NVIDIA H200\n" in text
    assert "| attention | base N198 | base N578 |" in text
    assert "| sdpa cudnn | 0.250 / 0.250 (40%, 1.25x) |  |" in text
    assert "| fastdeit | ~0.160 / 0.160 (91%) |" in text
    assert "| resize | torchvision | 20.000 | 40.00 | 12,800 | 10.00 |" in text
    assert "| check | fastdeit | refused: 3 of 4 samples differ |  |  |  |" in text
    assert "- fastdeit: refused: output 0: error 1e0 (attention base N578, batch 256)" in text
    assert "target missed: 4.00x the floor, at most 3x" in text
    assert "- roof: 4.30 TB/s copied, 790 TFLOP/s" in text
    assert "driver 580.95; commit 0123456789ab" in text


def test_the_newest_record_of_a_shape_is_shown():
    old = model_record("bias_gelu", {"fastdeit": 0.7})
    new = model_record("bias_gelu", {"fastdeit": 0.3}, environment={**ENVIRONMENT, "date": "2026-02-01T00:00"})
    for order in ([old, new], [new, old]):
        text = tables.markdown(order)
        assert "0.300 / 0.300" in text
        assert "0.700" not in text


@pytest.mark.slow
def test_the_plot_has_a_panel_an_operation(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "kernels.png"
    tables.plot_kernels(RECORDS, path)
    with Image.open(path) as picture:
        assert picture.width > 1500
        assert picture.convert("L").getextrema()[0] < 128
    few = tmp_path / "few.png"
    tables.plot_kernels(RECORDS[:1], few)
    with Image.open(few) as picture:
        assert 400 < picture.width < 800
    refused("no figure to draw", tables.plot_kernels, RECORDS[-1:], path)


def test_conversions_have_a_table_of_their_own():
    side = {"work": "beton", "images_per_second": 1353.6, "spread": 0.13, "windows": [1300.0] * 5, "megabytes": 247.1}
    record = {"benchmark": "convert", "images": 4000, "mean_bytes": 59446, "workers": 2, "sides": {"ours": side}}
    record |= {"failed": {"ffcv": "no"}, "missing": {"webdataset": "pip install webdataset"}}
    record["environment"] = {**ENVIRONMENT, "gpu": None, "cpu": "Some CPU", "cores": 2}
    text = tables.markdown([record, {**record, "workers": 1}])
    assert text.startswith("### Conversion, Some CPU, 2 cores")
    assert "4,000 JPEGs of 59 kB, 2 processes, until" in text
    assert "| ours | beton | 1,354 | 13% | 247 |" in text
    assert "| webdataset | pip install webdataset |  |  |  |" in text
    assert "1 process, until" in text
