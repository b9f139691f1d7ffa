"""Cut photographs are what was asked for, the same every time, and never empty sky."""

import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from benchmarks.photos import copy_photos, make_photos, shrink_photos
from fastdeit.pipelines.errors import UserError
from refusals import refused


@pytest.fixture
def sources(tmp_path):
    """Two textured pictures, the second with an empty left half."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(2):
        noise = Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8))
        picture = np.array(noise.filter(ImageFilter.GaussianBlur(2)))
        if number:
            picture[:, :200] = 90
        paths.append(tmp_path / f"source{number}.png")
        Image.fromarray(picture).save(paths[-1])
    return paths


def read_all(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.jpg")}


def test_photos_are_as_asked(tmp_path, sources):
    folder = make_photos(tmp_path / "a", 24, size=(80, 60), quality=80, sources=sources)
    images = read_all(folder)
    assert len(images) == 24
    assert len(set(images.values())) == 24
    for path in images:
        with Image.open(folder / path) as image:
            assert image.size == (80, 60)
            assert image.mode == "RGB"
            assert [layer[1:3] for layer in image.layer] == [(2, 2), (1, 1), (1, 1)]  # 4:2:0
            assert np.asarray(image).std() > 1
    record = json.loads((folder / "photos.json").read_text())
    assert record["windows_passed_over"] > 0
    assert record["files"] == [str(path) for path in sources]


def test_same_seed_same_bytes(tmp_path, sources):
    a = read_all(make_photos(tmp_path / "a", 6, size=(80, 60), sources=sources))
    b = read_all(make_photos(tmp_path / "b", 6, size=(80, 60), sources=sources))
    c = read_all(make_photos(tmp_path / "c", 6, size=(80, 60), sources=sources, seed=1))
    assert a == b
    assert a.keys() == c.keys()
    assert a != c


def test_a_finished_folder_is_kept_and_another_one_refused(tmp_path, sources):
    folder = make_photos(tmp_path / "a", 4, size=(80, 60), sources=sources)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    make_photos(folder, 4, size=(80, 60), sources=sources)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    refused("holds other photographs", make_photos, folder, 5, size=(80, 60), sources=sources)


def test_unusable_sources_are_named(tmp_path):
    Image.new("RGB", (100, 100), (9, 9, 9)).save(tmp_path / "flat.png")
    with pytest.raises(UserError, match=r"flat\.png: 100 windows in a row without texture"):
        make_photos(tmp_path / "a", 1, size=(80, 60), sources=[tmp_path / "flat.png"])
    with pytest.raises(UserError, match=r"flat\.png: 100 x 100 pixels, smaller"):
        make_photos(tmp_path / "b", 1, size=(180, 60), sources=[tmp_path / "flat.png"])


def test_reduced_photos_are_the_same_pictures(tmp_path, sources):
    folder = make_photos(tmp_path / "a", 6, size=(160, 120), sources=sources[:1])
    Image.new("RGB", (30, 70)).save(folder / "class0" / "small.jpg")
    assert shrink_photos(folder, tmp_path / "b", 80) == 1
    assert read_all(tmp_path / "b").keys() == read_all(folder).keys()
    for path in read_all(folder):
        with Image.open(folder / path) as before, Image.open(tmp_path / "b" / path) as after:
            if path.name == "small.jpg":
                assert after.size == (30, 70)
                continue
            assert after.size == (80, 60)
            wanted = np.asarray(before.reduce(2), np.int16)
            assert np.abs(np.asarray(after, np.int16) - wanted).mean() < 8


def test_copies_are_as_many_as_asked_for(tmp_path, sources):
    folder = make_photos(tmp_path / "a", 4, size=(80, 60), sources=sources)
    copies = read_all(copy_photos(folder, tmp_path / "b", 10))
    assert len(copies) == 10
    assert set(copies.values()) == set(read_all(folder).values())
