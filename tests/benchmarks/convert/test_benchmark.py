"""Every converter writes all of the photographs, and one that cannot is named."""

import json
from unittest.mock import Mock

import pytest

from benchmarks.convert import benchmark as convert
from pictures import jpeg, picture
from refusals import refused
from tiny_datasets import image_folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("photos"), [jpeg(picture(i, (80, 60))) for i in range(8)], 2)


@pytest.mark.slow
def test_converters_take_turns_and_are_recorded(photos, tmp_path, monkeypatch, ended):
    pytest.importorskip("ffcv")
    pytest.importorskip("webdataset")
    pytest.importorskip("wds2idx", reason="a module that DALI installs")
    own = {
        "broken": Mock(side_effect=OSError("no such luck")),
        "lazy": Mock(return_value=3),
        "absent": Mock(side_effect=ImportError("No module named 'nothing'")),
    }
    monkeypatch.setattr(
        convert, "CONVERTERS", {**convert.CONVERTERS, **{n: convert.Converter("none", f) for n, f in own.items()}}
    )
    results = tmp_path / "convert.jsonl"
    command = ["--photos", str(photos), "--images", "70", "--workers", "1", "--windows", "2", "--results", str(results)]
    printed = ended(1, convert.main, command).out
    record = json.loads(results.read_text())
    assert record["sides"].keys() == convert.CONVERTERS.keys() - own.keys()
    assert all(len(side["windows"]) == 2 for side in record["sides"].values())
    # The photographs as they are, with headers or tables around them.
    total = record["images"] * record["mean_bytes"] / 1e6
    assert total <= record["sides"]["webdataset+wds2idx"]["megabytes"] + 0.1
    assert record["images"] == 70
    assert record["failed"] == {"broken": "OSError: no such luck", "lazy": "RuntimeError: 3 of 64 images were written"}
    assert "No module named 'nothing': pip install" in record["missing"]["absent"]
    assert all(name in printed for name in convert.CONVERTERS)


def test_mistaken_options(photos, tmp_path):
    for options, reason in (
        ({"sides": ("zip",)}, "--sides zip: there are only fastdeit-beton"),
        ({"windows": 0}, "give at least 1"),
        ({"images": 3}, "give at least 1 and 64"),
    ):
        refused(reason, convert.measure, convert.Options(photos=photos, **options), tmp_path)
