"""The tables show the latest figures of each machine, and nothing that was not measured."""

import pytest

from benchmarks import tables
from fastdeit.cli import UserError

GPU = {"name": "NVIDIA H200", "driver": "580.95"}


def record(date, timm_rate, our_rate, *, gpu=GPU, mode="train", **changes):
    sides = {
        name: {"images_per_second": rate, "spread": 0.02, "windows": [rate] * 5, "peak_memory_mib": 2048.0}
        for name, rate in (("timm eager", timm_rate), ("fastdeit eager", our_rate))
        if rate is not None
    }
    found = {
        "date": date,
        "command": "python -m benchmarks throughput",
        "commit": "0123456789abcdef",
        "cpu": "Some CPU",
        "cores": 2,
        "gpu": gpu,
        "versions": {"torch": "2.11.0", "timm": "1.0.25", "triton": None},
    }
    case = {"model": "deit_tiny", "img_size": 224, "mode": mode, "precision": "bf16", "batch": 256, "ema": False}
    case |= {"benchmark": "throughput", "device": "cuda" if gpu else "cpu"}
    return {**case, "environment": found, "sides": sides, "failed": {}, **changes}


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("| deit")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_latest_record_of_a_configuration_wins():
    old, new = record("2026-01-01T00:00", 100.0, 150.0), record("2026-02-01T00:00", 1000.0, 2500.0)
    for order in ([old, new], [new, old]):
        (row,) = rows(tables.markdown(order))
        assert row[5:] == ["1,000 (2.0 GiB)", "2,500 (2.0 GiB)", "2.50"]


def test_machines_and_configurations_are_kept_apart():
    text = tables.markdown(
        [
            record("2026-01-01T00:00", 10.0, 12.0, gpu=None),
            record("2026-01-01T00:00", 100.0, 150.0),
            record("2026-01-01T00:00", 300.0, 300.0, mode="infer"),
            record("2026-01-01T00:00", 50.0, 60.0, model="deit_base"),
        ]
    )
    assert text.count("### ") == 2
    assert "### Throughput, NVIDIA H200\n" in text
    assert "### Throughput, Some CPU, 2 cores\n" in text
    assert len(rows(text)) == 4


def test_what_was_not_measured_is_not_shown_as_a_figure():
    lone = record("2026-01-01T00:00", None, 100.0, failed={"timm eager": "out of memory at batch 256"})
    refused = record("2026-01-01T00:00", None, None, mode="infer", refused="logits of cls differ")
    text = tables.markdown([lone, refused, record("2026-01-01T00:00", 100.0, 150.0, batch=8)])
    assert ["out of memory at batch 256", "100 (2.0 GiB)", ""] in [row[5:] for row in rows(text)]
    assert ["", "", "not timed"] in [row[5:] for row in rows(text)]
    assert "is not timed: logits of cls differ" in text


def test_the_source_of_the_figures_is_beside_them():
    text = tables.markdown([record("2026-01-05T00:00", 1.0, 2.0)])
    for expected in ("torch 2.11.0", "driver 580.95", "commit 0123456789ab", "2026-01-05", "At least 5 windows", "2%"):
        assert expected in text


def test_loaders_have_a_table_of_their_own():
    figures = {"spread": 0.03, "windows": [1.0] * 5, "cpu_ms_per_image": 4.25, "peak_memory_mib": 1500.0}
    sides = {
        "timm": {**figures, "images_per_second": 400.0, "remarks": []},
        "ffcv": {**figures, "images_per_second": 1000.0, "remarks": ["no mixing"]},
    }
    made = record("2026-01-01T00:00", 1.0, 1.0, gpu=None)
    shared = {"benchmark": "loaders", "batch": 64, "threads": 2, "images": 500, "mean_bytes": 110_400}
    loaders = {**shared, "environment": made["environment"], "failed": {"torch": "it ended"}, "sides": sides}
    text = tables.markdown([loaders, made])
    assert "### Loaders, Some CPU, 2 cores" in text
    assert "| ffcv | 1,000 | 2.50 | 4.25 | 1,500 |" in text
    assert "| torch | it ended | | | |" in text
    assert "500 JPEGs of 110 kB" in text
    assert "- ffcv: no mixing" in text
    assert len(rows(text)) == 1


def test_missing_and_damaged_files_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        tables.main(["--results", str(tmp_path)])
    assert ended.value.code == 2
    assert "no results yet" in capsys.readouterr().err
    path = tmp_path / "throughput.jsonl"
    path.write_text('{"a": 1}\n{"b":\n')
    with pytest.raises(UserError, match=r"throughput\.jsonl, line 2 is not JSON"):
        tables.read(path)


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    path = tmp_path / "figures.png"
    tables.plot([record("2026-01-01T00:00", 100.0, 150.0), record("2026-01-01T00:00", 9.0, 9.5, gpu=None)], path)
    with Image.open(path) as picture:
        assert picture.width > 600
        assert picture.convert("L").getextrema()[0] < 128
