"""The tables show the latest figures of each machine, and nothing that was not measured."""

import pytest
from PIL import Image

from benchmarks import tables
from refusals import refused

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


def loader_record(threads, rates, **changes):
    figures = {"spread": 0.03, "cpu_ms_per_image": 4.25, "peak_memory_mib": 1500.0, "work": "complete recipe"}
    sides = {
        name: {**figures, "images_per_second": rate, "windows": [0.9 * rate, rate], "remarks": []}
        for name, rate in rates.items()
    }
    made = {"benchmark": "loaders", "batch": 64, "cache": "warm", "threads": threads, "photo_side": 500}
    made |= {"images": 500, "mean_bytes": 110_400, "photos_not_reduced": 0, "sides": sides, "failed": {}, "missing": {}}
    return {**made, "environment": record("2026-01-01T00:00", 1.0, 1.0, gpu=None)["environment"], **changes}


def test_loaders_have_a_table_of_their_own():
    loaders = loader_record(
        2, {"timm": 400.0, "ffcv": 1000.0}, failed={"torch": "it ended"}, missing={"spdl": "install"}
    )
    loaders["sides"]["ffcv"] |= {"remarks": ["no mixing"], "work": "decode, crop, flip only"}
    text = tables.markdown([loaders, record("2026-01-01T00:00", 1.0, 1.0, gpu=None)])
    assert "### Loaders, Some CPU, 2 cores" in text
    assert "| ffcv | decode, crop, flip only | 1,000 | 3% | 2.50 | 4.25 | 1,500 |" in text
    assert "| torch | failed: it ended |  |  |  |  |  |" in text
    assert "| spdl | missing: install |  |  |  |  |  |" in text
    assert "500 JPEGs of 110 kB, longest side 500" in text
    assert "- ffcv: no mixing" in text
    assert "added core" not in text
    assert len(rows(text)) == 1


def test_loaders_by_threads_show_what_an_added_core_brings():
    one = loader_record(1, {"ours": 1000.0, "timm": 200.0})
    four = loader_record(4, {"ours": 3400.0, "spdl": 300.0})
    cold = loader_record(4, {"ours": 1.0}, cache="cold")
    text = tables.markdown([four, cold, one])
    assert "| loader | 1 thread | 4 threads |" in text
    assert "| ours | 1,000 | 3,400 (0.80) |" in text  # 2400 from three cores, of 1000 each
    assert "| timm | 200 |  |" in text
    assert "| spdl |  | 300 |" in text
    assert text.count("added core") == 1


def test_soaks_have_a_table_of_their_own():
    found = {"slope": 0.124, "interval": [-0.05, 0.31], "growth": 0.012, "reasons": []}
    made = {"benchmark": "soak", "loader": "turbo", "repeats": 3, "batch": 128, "threads": 2, "minutes": 60.0}
    made |= {"batches": 56_000, "epochs": 8000, "peak_memory_mib": 1100.4, "passed": True, "verdict": found}
    made["environment"] = record("2026-01-01T00:00", 1.0, 1.0, gpu=None)["environment"]
    failed = {**made, "loader": "ffcv", "passed": False, "verdict": {**found, "reasons": ["threads grew"]}}
    text = tables.markdown([made, failed])
    assert "| turbo | 60 | 56,000 | 8,000 | 1,100 | +0.12 (-0.05 to +0.31) | +1.2% | passed |" in text
    assert "| threads grew |" in text


PLOTS = {
    "loaders": [loader_record(n, {"fastdeit-ffcv-x3": 900.0 * n, "timm": 300.0}) for n in (1, 2)],
    "throughput": [record("2026-01-01T00:00", 100.0, 150.0), record("2026-01-01T00:00", 9.0, 9.5, gpu=None)],
}


@pytest.mark.parametrize(("kind", "width"), [("loaders", 1000), ("throughput", 600)])
def test_the_plot_is_a_picture(tmp_path, kind, width):
    pytest.importorskip("matplotlib")
    plot = {"loaders": tables.plot_loaders, "throughput": tables.plot_throughput}[kind]
    plot(PLOTS[kind], tmp_path / "figures.png")
    with Image.open(tmp_path / "figures.png") as picture:
        assert picture.width > width
        assert picture.convert("L").getextrema()[0] < 128


def test_a_plot_without_figures_is_refused(tmp_path):
    refused("no figure to draw", tables.plot_loaders, [], tmp_path / "loaders.png")


def test_missing_and_damaged_files_are_named(tmp_path, ended):
    assert "no results yet" in ended(2, tables.main, ["--results", str(tmp_path)]).err
    path = tmp_path / "throughput.jsonl"
    path.write_text('{"a": 1}\n{"b":\n')
    refused(r"throughput\.jsonl, line 2 is not JSON", tables.read, path)


def test_an_older_record_has_its_pass_renamed(tmp_path):
    path = tmp_path / "kernels.jsonl"
    path.write_text('{"op": "augment", "pass": "finish"}\n')
    assert tables.read(path) == [{"op": "augment", "pass": "normalize_erase_mix"}]
