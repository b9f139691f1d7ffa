"""The loader benchmark runs its sides one at a time, measures them all, and names one that fails."""

import json

import numpy as np
import psutil
import pytest
from PIL import Image
from timm.data import auto_augment

from benchmarks import loaders
from benchmarks.loader_sides import Setting, posterize
from benchmarks.loaders import Options, Side, SideError, measure, prepare_photos, report
from fastdeit.cli import UserError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(24):
        folder = root / f"class{i % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i:03d}.jpg")
    return root


def test_posterize_is_timms_but_for_no_bits():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    for bits in range(1, 9):
        assert posterize(image, bits).tobytes() == auto_augment.posterize(image, bits).tobytes()
    assert posterize(image, 0).tobytes() == bytes(9 * 7 * 3)


def test_every_side_is_measured_and_ended(photos, tmp_path):
    before = set(psutil.Process().children(recursive=True))
    results = tmp_path / "loaders.jsonl"
    options = Options(
        photos=photos,
        batch=8,
        threads=1,
        windows=2,
        window_seconds=0.1,
        sides=("fastdeit-torch-x3", "timm"),
        results=results,
    )
    assert loaders.loaders(options)
    assert set(psutil.Process().children(recursive=True)) <= before
    record = json.loads(results.read_text())
    assert record["failed"] == {}
    assert (record["images"], record["threads"], record["batch"]) == (24, 1, 8)
    for name in options.sides:
        figures = record["sides"][name]
        assert len(figures["windows"]) == 2
        assert min(figures["windows"]) <= figures["images_per_second"] <= max(figures["windows"])
        assert figures["cpu_ms_per_image"] > 0
        assert figures["peak_memory_mib"] >= 0
    assert "posterize" in record["sides"]["timm"]["remarks"][0]
    table = report(record)
    assert "1.00" in next(line for line in table.splitlines() if line.startswith("timm "))


def test_a_side_that_fails_is_named_with_its_reason(photos, tmp_path):
    options = Options(photos=photos, batch=7, threads=1, windows=1, window_seconds=0.1, sides=("fastdeit-torch-x3",))
    record = measure(options)
    assert record["sides"] == {}
    assert "mixing group of 7 samples cannot be paired" in record["failed"]["fastdeit-torch-x3"]
    assert "cannot be paired" in report(record)


def test_a_side_without_its_data_says_so(photos, tmp_path):
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(SideError, match=r"it ended: FileNotFoundError.*missing\.beton"):
        Side.start(Setting("fastdeit-torch-x1", str(photos), str(tmp_path / "missing.beton"), 8, 1), tmp_path)
    assert set(psutil.Process().children(recursive=True)) <= before


def test_an_unknown_side_is_refused(photos):
    with pytest.raises(UserError, match="--sides dali: there are only fastdeit-ffcv-x3, "):
        measure(Options(photos=photos, sides=("timm", "dali")))


def test_a_folder_without_jpegs_is_refused(tmp_path):
    with pytest.raises(UserError, match="no JPEG files"):
        prepare_photos(tmp_path)
