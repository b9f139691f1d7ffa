"""Every converter writes all of the photographs, and one that cannot is named."""

import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from benchmarks.convert import benchmark as convert
from fastdeit.pipelines.errors import UserError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for i in range(8):
        noise = Image.fromarray(np.random.default_rng(i).integers(0, 256, (60, 80, 3), dtype=np.uint8))
        path = root / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        noise.filter(ImageFilter.GaussianBlur(2)).save(path)
    return root


def broken(tree, dest, workers):
    raise OSError("no such luck")


def lazy(tree, dest, workers):
    return 3


def absent(tree, dest, workers):
    raise ImportError("No module named 'nothing'")


def test_converters_take_turns_and_are_recorded(photos, tmp_path, monkeypatch, capsys):
    pytest.importorskip("ffcv")
    pytest.importorskip("webdataset")
    pytest.importorskip("wds2idx", reason="a module that DALI installs")
    own = {"broken": broken, "lazy": lazy, "absent": absent}
    monkeypatch.setattr(
        convert, "CONVERTERS", {**convert.CONVERTERS, **{n: convert.Converter("none", f) for n, f in own.items()}}
    )
    results = tmp_path / "convert.jsonl"
    command = ["--photos", str(photos), "--images", "70", "--workers", "1", "--windows", "2", "--results", str(results)]
    with pytest.raises(SystemExit) as caught:
        convert.main(command)
    assert caught.value.code == 1
    record = json.loads(results.read_text())
    assert record["sides"].keys() == convert.CONVERTERS.keys() - own.keys()
    assert all(len(side["windows"]) == 2 for side in record["sides"].values())
    # The photographs as they are, with headers or tables around them.
    total = record["images"] * record["mean_bytes"] / 1e6
    assert total <= record["sides"]["webdataset+wds2idx"]["megabytes"] + 0.1
    assert record["images"] == 70
    assert record["failed"] == {"broken": "OSError: no such luck", "lazy": "RuntimeError: 3 of 64 images were written"}
    assert "No module named 'nothing': pip install" in record["missing"]["absent"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in convert.CONVERTERS)


def test_mistaken_options(photos, tmp_path):
    for options, reason in (
        ({"sides": ("zip",)}, "--sides zip: there are only fastdeit-beton"),
        ({"windows": 0}, "give at least 1"),
        ({"images": 3}, "give at least 1 and 64"),
    ):
        with pytest.raises(UserError, match=reason):
            convert.measure(convert.Options(photos=photos, **options), tmp_path)
