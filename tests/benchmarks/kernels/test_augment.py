"""The benchmark of the device augmentation, small and without a GPU."""

import time
from unittest.mock import Mock

import pytest
import torch

from benchmarks.kernels import augment
from benchmarks.kernels.augment import Job, measure

pytestmark = pytest.mark.slow


@pytest.fixture
def job(monkeypatch):
    monkeypatch.setattr(augment, "HEIGHT", 24)
    monkeypatch.setattr(augment, "WIDTH", 30)
    return Job.draw(4, 16, torch.float32)


def by_the_clock(call):
    start = time.perf_counter()
    call()
    return [1e3 * (time.perf_counter() - start)]


def no_graph(call):
    return None


def test_every_pass_is_timed_beside_its_peers(job, device):
    records = {record["pass"]: record for record in measure(job, device, by_the_clock, no_graph, 1e9)}
    assert list(records) == ["resize", "operations", "normalize_erase_mix", "augment", "stage", "stage from the host"]
    for record in records.values():
        assert record["sides"]["fastdeit"]["images_per_second"] > 0
        assert not record["failed"]
    assert "torchvision" in records["resize"]["sides"]
    assert "torchvision, a draw an image" in records["augment"]["sides"]
    # 4 images of 3 x 16 x 16, read as bytes and written as float32.
    assert records["normalize_erase_mix"]["floor_ms"] == pytest.approx(4 * 768 * 5 / 1e6)


def test_our_passes_are_held_against_the_floor_without_their_launches(job, device):
    captured = []

    def graph(call):
        captured.append(call)
        return [0.5, 0.25, 0.75] if len(captured) > 1 else None

    records = {record["pass"]: record for record in measure(job, device, lambda call: [2.0], graph, 1e9)}
    assert len(captured) == 5  # what comes from the host waits for the copy before the last
    assert "graph_ms" not in records["resize"]["sides"]["fastdeit"]
    for name in ("operations", "normalize_erase_mix", "augment", "stage"):
        ours = records[name]["sides"].pop("fastdeit")
        assert ours["times_floor"] == pytest.approx(0.5 / records[name]["floor_ms"])
        assert ours["images_per_second"] == pytest.approx(4 / 2e-3)
        assert not any("graph_ms" in peer for peer in records[name]["sides"].values())


def test_a_peer_that_cannot_be_put_together_is_told_and_costs_no_figure(job, device, monkeypatch):
    monkeypatch.setattr(
        augment, "_add_kornia", Mock(side_effect=AttributeError("module 'kornia' has no attribute 'auto'\nsome more"))
    )
    monkeypatch.setattr(augment.v2.RandAugment, "forward", Mock(side_effect=AssertionError))
    records = {record["pass"]: record for record in measure(job, device, by_the_clock, no_graph, 1e9)}
    assert records["augment"]["failed"]["kornia"] == "AttributeError: module 'kornia' has no attribute 'auto'"
    assert records["augment"]["failed"]["torchvision, one draw a batch"] == "AssertionError"
    assert not records["stage"]["failed"]
    assert all("fastdeit" in record["sides"] for record in records.values())


def test_what_is_wrong_is_not_timed(job, device, monkeypatch):
    monkeypatch.setattr("fastdeit.pipelines.device.stage.normalized_levels", lambda *_: torch.zeros(3, 256).numpy())
    (record,) = measure(job, device, by_the_clock, no_graph, 1e9)
    assert "4 of 4 samples differ from the host's" in record["refused"]["fastdeit"]
    assert record["sides"] == {}
