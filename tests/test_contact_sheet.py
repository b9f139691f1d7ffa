"""The contact sheet, small: as many pictures as told, and a stage that differs from Pillow is seen."""

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment

from fastdeit.pipelines.plan.plan import INCREASING
from tests import contact_sheet
from tests.contact_sheet import MAGNITUDES, Options, sheet, strength


@pytest.fixture(scope="module")
def photo():
    y, x = np.mgrid[:60, :90]
    noise = np.random.default_rng(0).integers(0, 60, (60, 90, 3))
    return (np.stack([2 * x, 3 * y, x + y], 2) + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", INCREASING)
def test_strengths_are_timms(name, monkeypatch):
    monkeypatch.setattr(auto_augment.random, "random", lambda: 0.0)  # no strength is negated
    factory = next(n for n in auto_augment._RAND_INCREASING_TRANSFORMS if n.removesuffix("Increasing") == name)
    level_to_arg = auto_augment.LEVEL_TO_ARG[factory]
    for magnitude in MAGNITUDES:
        expected = level_to_arg(magnitude, {"translate_pct": 0.45})[0] if level_to_arg else 0.0
        assert strength(name, magnitude) == pytest.approx(expected)


def test_every_operation_is_pillows_and_one_that_is_not_is_counted(photo, monkeypatch):
    picture, different = sheet(photo, 24)
    assert different == 0
    assert picture.width > 2 * 6 * 24
    assert picture.height > 8 * 24
    right = contact_sheet.replay
    monkeypatch.setattr(contact_sheet, "replay", lambda *args: right(*args).point(lambda level: level ^ 1))
    assert sheet(photo, 24, INCREASING[:2])[1] == 2 * len(MAGNITUDES)


def test_the_command_writes_a_file(tmp_path, photo, capsys):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    path = tmp_path / "new" / "sheet.jpg"
    contact_sheet.main(["--file", str(path), "--photo", str(tmp_path / "photo.png"), "--size", "16"])
    assert "0 of 45 pictures differ" in capsys.readouterr().out
    with Image.open(path) as picture:
        assert picture.format == "JPEG"
    assert contact_sheet.draw_sheet(Options(file=path, photo=tmp_path / "photo.png", size=16))
