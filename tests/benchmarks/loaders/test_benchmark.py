"""The loader benchmark runs its sides one at a time, measures them all, and names one that fails."""

import json
import os
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
from PIL import Image
from timm.data import auto_augment

from benchmarks.loaders.benchmark import LoaderCase, Options, cases, chosen_contenders, measure, run_benchmark
from benchmarks.loaders.contender_process import ContenderError, ContenderProcess
from benchmarks.loaders.contenders import CONTENDERS
from benchmarks.loaders.peers.stream import Missing, Setting
from benchmarks.loaders.peers.timm_loader import posterize
from benchmarks.loaders.report import table
from benchmarks.photos import prepare_photos
from pictures import jpeg, picture
from refusals import refused
from tiny_datasets import image_folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("photos"), [jpeg(picture(i, (50, 40))) for i in range(24)], 2)


def test_posterize_is_timms_but_for_no_bits():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    for bits in range(1, 9):
        assert posterize(image, bits).tobytes() == auto_augment.posterize(image, bits).tobytes()
    assert posterize(image, 0).tobytes() == bytes(9 * 7 * 3)


def options(photos, sides, **changes):
    short = {"batch": 8, "threads": (1,), "windows": 1, "window_seconds": 0.1}
    return Options(photos=photos, sides=sides, **{**short, **changes})


def one_record(options, folder):
    (record,) = measure(options, folder)
    return record


@pytest.mark.slow
def test_every_side_is_measured_and_ended(photos, tmp_path):
    before = set(psutil.Process().children(recursive=True))
    results = tmp_path / "loaders.jsonl"
    asked = options(photos, ("fastdeit-torch-x3", "timm"), windows=2, results=results)
    assert run_benchmark(asked)
    assert set(psutil.Process().children(recursive=True)) <= before
    record = json.loads(results.read_text())
    assert (record["failed"], record["missing"]) == ({}, {})
    assert (record["images"], record["threads"], record["batch"], record["photo_side"]) == (24, 1, 8, 50)
    for name in asked.sides:
        figures = record["sides"][name]
        assert len(figures["windows"]) == 2
        assert min(figures["windows"]) <= figures["images_per_second"] <= max(figures["windows"])
        assert figures["cpu_ms_per_image"] > 0
        assert figures["peak_memory_mib"] >= 0
        assert figures["work"] == "complete recipe"
    assert "posterize" in record["sides"]["timm"]["remarks"][0]
    text = table(record).text()
    assert "1.00" in next(line for line in text.splitlines() if line.startswith("timm "))


@pytest.mark.slow
def test_cold_windows_read_reduced_copies_that_left_the_page_cache(photos, tmp_path):
    asked = options(photos, ("fastdeit-torch-x1",), cache=("cold",), photo_side=(32,), cold_images=64)
    record = one_record(asked, tmp_path)
    assert (record["cache"], record["photo_side"], record["images"]) == ("cold", 32, 24)
    (remark,) = record["sides"]["fastdeit-torch-x1"]["remarks"]
    assert "stayed in the page cache" in remark
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_side_that_fails_is_named_with_its_reason(photos, tmp_path):
    record = one_record(options(photos, ("fastdeit-torch-x3",), batch=7), tmp_path)
    assert record["sides"] == {}
    assert "run.global_batch is 7, but Mixup and CutMix mix pairs" in record["failed"]["fastdeit-torch-x3"]
    assert "mix pairs of samples" in table(record).text()


def test_a_side_that_is_not_installed_is_named_as_missing(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(ContenderProcess, "start", Mock(side_effect=Missing("not installed: pip install it")))
    record = one_record(options(photos, ("spdl",)), tmp_path)
    assert record["missing"] == {"spdl": "not installed: pip install it"}
    assert "spdl    missing: not installed: pip install it" in table(record).text()


@pytest.mark.slow
def test_a_side_without_its_data_says_so(photos, tmp_path):
    before = set(psutil.Process().children(recursive=True))
    setting = Setting("fastdeit-torch-x1", str(photos), str(tmp_path / "missing.beton"), str(tmp_path), 8, 1, 1)
    with pytest.raises(ContenderError, match=r"it ended: FileNotFoundError.*missing\.beton"):
        ContenderProcess.start(setting, tmp_path)
    assert set(psutil.Process().children(recursive=True)) <= before


def test_what_cannot_be_measured_is_refused(photos):
    refused("--sides dali: there are only fastdeit-turbo-x3, ", chosen_contenders, options(photos, ("timm", "dali")))
    refused("--repeats 2: no contender", chosen_contenders, options(photos, ("fastdeit-ffcv-x3",), repeats=(2,)))
    refused("--threads 1000: this process may use", cases, options(photos, ("timm",), threads=(1, 1000)))


def test_cases_are_every_combination():
    assert cases(Options(threads=(1,), photo_side=(256, 500), cache=("warm", "cold"))) == [
        LoaderCase(256, "warm", 1),
        LoaderCase(256, "cold", 1),
        LoaderCase(500, "warm", 1),
        LoaderCase(500, "cold", 1),
    ]
    full = cases(Options(full=True))
    assert {case.photo_side for case in full} == {256, 400, 500}
    assert max(case.threads for case in full) == len(os.sched_getaffinity(0))


def test_repeats_choose_among_ours_only():
    names = chosen_contenders(Options(repeats=(1,)))
    assert "fastdeit-ffcv-x1" in names
    assert "fastdeit-ffcv-x3" not in names
    assert {name for name in CONTENDERS if not name.startswith("fastdeit")} <= set(names)


def test_a_folder_without_jpegs_is_refused(tmp_path):
    refused("no JPEG files", prepare_photos, tmp_path)
