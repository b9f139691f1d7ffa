"""What `auto` chooses, why it says so, and that timing changes nothing; the judge of speed is a loader that sleeps."""

import importlib.util
import sys
import time
from unittest.mock import Mock

import numpy as np
import pytest

import tiny_datasets
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.beton_layout import JPEG, RAW
from fastdeit.pipelines.loaders import choose as loading
from fastdeit.pipelines.loaders import turbo
from fastdeit.pipelines.loaders.choose import choose_loader, open_loader
from fastdeit.pipelines.loaders.pillow import TorchLoader
from fastdeit.pipelines.plan.order import EpochOrder, EvalOrder
from pictures import picture
from refusals import refused
from system import run_python
from tiny_datasets import stored

COUNT = 40


def write(path, modes):
    """A beton file with an image of every mode; label i."""
    return tiny_datasets.write(path, [stored(picture(i, (50, 40 + i)), mode) for i, mode in enumerate(modes)])


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    return write(tmp_path_factory.mktemp("jpegs") / "jpegs.beton", [JPEG] * COUNT)


@pytest.fixture
def options(pool):
    return {"pool": pool, "threads": 2, "on_error": "fail"}


def first_step(count, batch):
    return EvalOrder(count, batch=batch).step(0, 0)


def sleeping(name, seconds, used):
    """A loader that decodes as PIL does, `seconds` later, and notes each image."""

    class Sleeping(TorchLoader):
        def decode_image(self, index, out, region=None):
            time.sleep(seconds)
            used.append((name, index))
            return super().decode_image(index, out)

    Sleeping.name = name
    return Sleeping


@pytest.fixture
def candidates(monkeypatch):
    """Function: the fast loaders are these, by name and the seconds that each takes for an image; what they decode."""

    def make(**seconds):
        used = []
        monkeypatch.setattr(loading, "FAST", {name: lambda: None for name in seconds})
        for name, pause in seconds.items():
            monkeypatch.setitem(loading.LOADERS, name, sleeping(name, pause, used))
        return used

    return make


def test_the_fastest_is_chosen_and_the_rates_are_told(candidates, jpegs, options):
    candidates(slow=0.02, quick=0.001, middling=0.01)
    samples = first_step(COUNT, 10)
    chosen, reason = choose_loader(jpegs, samples, **options)
    assert chosen == "quick"
    for name in ("slow", "quick", "middling"):
        assert f"{name} " in reason
    assert reason.endswith(": quick")
    with open_loader(chosen, jpegs, **options, reason=reason) as loader:
        assert (loader.name, loader.reason) == (chosen, reason)
        assert loader.decode(samples).index.tolist() == list(range(10))


def test_the_first_is_kept_unless_another_is_clearly_faster(candidates, jpegs, options, monkeypatch):
    candidates(first=0, second=0)
    for factor, chosen in ((1.04, "first"), (1.06, "second")):
        monkeypatch.setattr(loading, "_rates", lambda *_, factor=factor: {"first": 1000.0, "second": 1000.0 * factor})
        assert choose_loader(jpegs, first_step(COUNT, 10), **options)[0] == chosen


def test_each_decodes_the_first_images_of_the_order_with_all_their_copies(candidates, jpegs, options, monkeypatch):
    used = candidates(a=0, b=0)
    monkeypatch.setattr(loading, "ROUNDS", 3)
    monkeypatch.setattr(loading, "PIXELS", 5 * 80 * 50 // 2)  # about five images in all
    order = EpochOrder(COUNT, global_batch=24, group_size=8, repeats=3, seed=4)
    samples = order.step(0, 0)
    regions = np.tile(np.array([0, 0, 4, 4], np.int32), (len(samples.index), 1))
    asked = []
    decode = TorchLoader.decode

    def noted(self, samples, regions=None, **more):
        asked.append((samples, regions))
        return decode(self, samples, regions, **more)

    monkeypatch.setattr(TorchLoader, "decode", noted)
    choose_loader(jpegs, samples, regions, **options)
    assert all(len(part.index) == len(boxes) for part, boxes in asked)
    first = list(dict.fromkeys(samples.index.tolist()))
    for name in ("a", "b"):
        decoded = [index for who, index in used if who == name]
        images = set(decoded)
        assert images == set(first[: len(images)])
        assert 2 <= len(images) < len(first)
        assert all(decoded.count(index) == 4 for index in images)  # three rounds, and one that does not count


def test_the_time_it_takes_is_bounded(candidates, jpegs, options, monkeypatch):
    candidates(a=0.01, b=0.01)
    monkeypatch.setattr(loading, "SECONDS", 0.1)
    start = time.monotonic()
    choose_loader(jpegs, first_step(COUNT, 10), **options)
    assert time.monotonic() - start < 5 * 2 * 10 * 0.01  # less than the five rounds


def test_one_alone_is_not_timed(candidates, jpegs, options):
    used = candidates(alone=0)
    chosen = choose_loader(jpegs, first_step(COUNT, 10), **options)
    assert chosen == ("alone", "the only one of alone that is installed")
    assert used == []


def test_an_empty_share_is_not_timed(candidates, jpegs, options):
    used = candidates(a=0, b=0)
    assert choose_loader(jpegs, None, **options) == ("a", "there are no images to time the loaders with")
    assert used == []


def test_raw_images_are_not_timed(candidates, tmp_path, options):
    used = candidates(a=0, b=0)
    dataset = write(tmp_path / "raw.beton", [RAW] * 8)
    name, reason = choose_loader(dataset, first_step(8, 8), **options)
    assert name == "a"
    assert "raw" in reason
    assert used == []
    mixed = write(tmp_path / "mixed.beton", [RAW, JPEG] * 4)
    choose_loader(mixed, first_step(8, 8), **options)
    assert {index for _, index in used} == {1, 3, 5, 7}


def test_an_image_that_does_not_decode_is_told(candidates, tmp_path, options):
    candidates(a=0, b=0)
    dataset = write(tmp_path / "bad.beton", [JPEG] * 8)
    read = dataset.read
    dataset.read = lambda index: read(index)[:100] if index == 5 else read(index)
    name, reason = choose_loader(dataset, first_step(8, 8), **options)
    assert name == "a"
    assert "not timed" in reason
    assert "bad.beton: image 5" in reason


def test_one_that_cannot_be_opened_is_told(candidates, jpegs, options, monkeypatch):
    candidates(a=0, b=0.002, c=0)
    fail = Mock(side_effect=UserError("its library is broken: install another"))
    for method in ("_load", "decode_image"):
        monkeypatch.setitem(loading.LOADERS, "c", type("Broken", (TorchLoader,), {method: fail}))
        name, reason = choose_loader(jpegs, first_step(COUNT, 10), **options)
        assert name == "a"
        assert "not c: its library is broken: install another" in reason
    for other in ("a", "b"):
        monkeypatch.setitem(loading.LOADERS, other, loading.LOADERS["c"])
    name, reason = choose_loader(jpegs, first_step(COUNT, 10), **options)
    assert name == "torch"
    assert "not a: its library is broken" in reason


def test_without_any_it_is_torch_and_says_what_to_install(jpegs, options, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(turbo, "__file__", str(tmp_path / "loader_turbo.py"))
    turbo.find_turbo.cache_clear()
    name, reason = choose_loader(jpegs, first_step(COUNT, 8), **options)
    assert name == "torch"
    assert "FFCV" not in reason  # its pixels are its own: by name alone
    assert "NVIDIA DALI, which is not installed: pip install 'fastdeit[dali]'" in reason
    assert "libjpeg-turbo" in reason
    for name in ("ffcv", "dali", "turbo"):
        refused("install", open_loader, name, jpegs, **options)


def test_a_broken_ffcv_library_is_reported(tmp_path, monkeypatch):
    package = tmp_path / "ffcv"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_libffcv.so").write_bytes(b"no library")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "ffcv", raising=False)  # a test before this one may have imported the real one
    refused("cannot be loaded", loading.find_libffcv)


@pytest.mark.slow
def test_nothing_large_is_imported_to_look_for_it():
    code = """
import sys
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.loaders.choose import FAST
for find in FAST.values():
    try:
        find()
    except UserError:
        pass
assert not {"ffcv", "nvidia.dali"} & set(sys.modules)
"""
    run_python("-c", code, check=True, timeout=60)


def test_an_unknown_loader_is_refused(jpegs, options):
    refused("'none' is not one of auto, turbo, ffcv, dali, torch", open_loader, "none", jpegs, **options)
