"""A soak passes over a pipeline that leaves nothing behind, and fails for whatever is leaked into it."""

import json
import mmap
import os
import re
import threading

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from benchmarks.record import RESULTS
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.errors import UserError
from pictures import jpeg, picture
from system import run_python
from tests.soak import campaign
from tests.soak.campaign import MAX_SLOPE, Options, Sample, Verdict, judge, robust_slope
from tiny_datasets import image_folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("photos"), [jpeg(picture(i, (50, 40))) for i in range(32)], 2)


SHORT = {"loader": "torch", "batch": 16, "threads": 2, "img_size": 32, "sample_seconds": 0.1}


@pytest.mark.slow
def test_the_pipeline_is_flat_and_recorded(photos, tmp_path):
    """In a process of its own, since other tests may have left threads that still end."""
    results, picture = tmp_path / "soak.jsonl", tmp_path / "soak.png"
    options = {**SHORT, "minutes": 12 / 60, "epochs": 40, "photos": photos, "results": results, "plot": picture}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    out = run_python("-m", "tests.soak", *words, cwd=RESULTS.parents[1], status=0)
    record = json.loads(results.read_text())
    assert record["passed"]
    assert record["batches"] == 2 * record["epochs"] >= 80
    assert record["verdict"]["growth"] < 0.05
    assert "passed" in out.stdout
    with Image.open(picture) as drawn:
        assert drawn.width > 800


@pytest.mark.slow
def test_leaks_into_the_pipeline_are_found(photos, tmp_path):
    convert(str(photos), tmp_path / "photos.beton", progress=False)
    held, files, stop = [], [], threading.Event()

    def leak(batch):
        block = mmap.mmap(-1, 2**18)  # not of the heap, where a process that ran other tests has room
        block.write(bytes([1]) * 2**18)
        held.append(block)
        if len(held) % 16 == 0:
            files.append(open(os.devnull))  # noqa: SIM115
            threading.Thread(target=stop.wait, daemon=True).start()

    try:
        options = Options(minutes=7 / 60, epochs=30, **SHORT)
        verdict = judge(campaign.soak(options, tmp_path / "photos.beton", leak))
    finally:
        stop.set()
        for file in files:
            file.close()
    assert 125 < verdict.slope < 500  # 250 MiB per 1000 batches
    assert verdict.interval[0] > MAX_SLOPE
    reasons = "; ".join(verdict.reasons)
    for word in ("memory at the ends of epochs grows", "descriptors at", "threads at"):
        assert word in reasons


def samples(memory, *, descriptors=lambda i: 9, threads=lambda i: 5, count=300):
    """One epoch of ten batches a second, looked at in its middle and at its end."""
    made = []
    for i in range(count):
        made.append(Sample(i + 0.5, 10 * i + 5, memory(i) + 100, 30, 20, False))
        made.append(Sample(i + 1.0, 10 * i + 10, memory(i), descriptors(i), threads(i), True))
    return made


def noise(i):
    return np.random.default_rng(i).normal(0, 3)


def test_noise_and_what_warms_up_pass():
    verdict = judge(samples(lambda i: 500 + noise(i) + 4 * min(i, 90)))
    assert verdict.reasons == ()
    assert verdict.interval[0] < 0 < verdict.interval[1]
    assert judge(samples(lambda i: 500, descriptors=lambda i: 9 + (i < 90))).reasons == ()


def test_one_spike_passes():
    assert judge(samples(lambda i: 500 + noise(i) + 400 * (i in (150, 250)))).reasons == ()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"memory": lambda i: 500 + 0.08 * i}, "memory at the ends of epochs grows by 8.00 MiB per 1000 batches"),
        ({"memory": lambda i: 500 + 60 * (i >= 200)}, "memory grew by 10.0%, from 600 to 660 MiB"),
        ({"memory": lambda i: 500, "descriptors": lambda i: 9 + i // 120}, "descriptors at the ends .* from 9 to 11"),
        ({"memory": lambda i: 500, "threads": lambda i: 5 + (i == 250)}, "threads at the ends .* to 5, at most 6"),
    ],
)
def test_each_kind_of_growth_fails(changes, reason):
    reasons = judge(samples(**changes)).reasons
    assert any(re.search(reason, found) for found in reasons), reasons


def test_too_few_epochs_are_no_proof():
    with pytest.raises(UserError, match="3 epochs ended after the first third of the time, and 12 are needed"):
        judge(samples(lambda i: 500, count=3))


@pytest.mark.parametrize("count", [12, 40, 100])
def test_slope_is_theil_and_sens(count):
    rng = np.random.default_rng(count)
    x, y = np.sort(rng.uniform(0, 50, count)), rng.standard_cauchy(count)
    wanted = stats.theilslopes(y, x, alpha=0.95)
    slope, low, high = robust_slope(x, y)
    assert slope == pytest.approx(wanted.slope)
    assert (low, high) == pytest.approx((wanted.low_slope, wanted.high_slope))


def test_failing_ends_the_command_with_1(monkeypatch, tmp_path, ended):
    failed = Verdict(9.0, (8.0, 10.0), 0.2, (6, 9), (5, 5), ("descriptors went from 6 to 9",))
    monkeypatch.setattr(campaign, "soak", lambda options, data: samples(lambda i: 500))
    monkeypatch.setattr(campaign, "judge", lambda found: failed)
    words = ["--data", str(tmp_path), "--results", str(tmp_path / "soak.jsonl")]
    assert "failed: descriptors went from 6 to 9" in ended(1, campaign.main, words).out
