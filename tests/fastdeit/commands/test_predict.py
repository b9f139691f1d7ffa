"""`fastdeit predict` and `load`: the judge is timm's network with timm's transform on the same files."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
import timm
import torch
from judges import timms_outputs, timms_transform
from PIL import Image

from fastdeit.commands.predict import BAD, Options, images_of, predict
from fastdeit.image_files import read_batches
from fastdeit.loading import load
from pictures import exif
from refusals import refused
from runs import newest, train


@pytest.fixture(scope="module")
def trained(tiny_in, tmp_path_factory):
    """A distilled student's checkpoint."""
    recipe = tiny_in(tmp_path_factory.mktemp("predict") / "run", run={"epochs": 1})
    train(recipe)
    return newest(recipe), recipe


def timms(recipe, state, paths):
    """Probabilities by timm's network: the sum of both heads' softmaxes, halved."""
    transform = timms_transform(recipe)
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    return timms_outputs(recipe, state, images)["fused_probabilities"] / 2


@pytest.mark.slow
def test_probabilities_are_those_of_timm(trained, images, capsys):
    path, recipe = trained
    folder = images / "val" / "class1"
    status = predict(Options(model=path, images=(folder,), json=True, topk=4, device="cpu", batch=4, workers=2))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    files = sorted(folder.iterdir())
    assert status == 0
    assert [line["image"] for line in lines] == list(map(str, files))
    expected = timms(recipe, torch.load(path, weights_only=True)["ema"], files)
    for line, row in zip(lines, expected, strict=True):
        found = {each["label"]: each["probability"] for each in line["classes"]}
        assert [found[label] for label in range(4)] == pytest.approx(row.tolist(), abs=2e-6)
        assert [each["name"] for each in line["classes"]] == [f"class{each['label']}" for each in line["classes"]]
        assert line["classes"][0]["probability"] == max(found.values())


@pytest.mark.slow
def test_bad_images_cost_only_themselves(trained, images, tmp_path, capsys, monkeypatch):
    path, _ = trained
    good = images / "val" / "class0" / "000.jpg"
    (tmp_path / "cut.jpg").write_bytes(good.read_bytes()[:500])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "notes.txt").write_text("left out")
    os.link(good, tmp_path / "good\x1b[31m.jpg")
    os.mkfifo(tmp_path / "pipe")
    paths = [tmp_path, tmp_path / "pipe", good]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(map(str, paths)) + "\n\n"))
    assert predict(Options(model=path, images=(Path("-"),), device="cpu")) == BAD
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert "cut.jpg: cannot be read: " in err
    assert "text.png: cannot be read: it is not an image" in err
    assert "pipe: cannot be read: " in err
    assert "notes.txt" not in err
    assert f"2 images with the weights 'ema' of {path} on cpu: " in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": (Path("none.jpg"),)}, r"none\.jpg: there is no such image or folder"),
        ({"topk": 0}, "--topk 0: give at least 1"),
        ({"batch": 0}, "--batch 0"),
        ({"workers": -1}, "--workers -1"),
    ],
)
def test_mistakes_end_before_pytorch(options, message, tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"")
    refused(message, predict, Options(**{"model": tmp_path / "x.pt", "images": (tmp_path / "x.jpg",), **options}))


def test_folders_behind_links_count_once(tmp_path):
    tree, elsewhere = tmp_path / "tree", tmp_path / "elsewhere"
    for folder in (tree / "own", elsewhere / "deeper"):
        folder.mkdir(parents=True)
        (folder / "a.jpg").touch()
    (tree / "linked").symlink_to(elsewhere)
    (tree / "own" / "back").symlink_to(tree)
    assert images_of([tree]) == [tree / "linked" / "deeper" / "a.jpg", tree / "own" / "a.jpg"]


def test_a_folder_without_images(tmp_path):
    refused(r"no images in this folder .*: name another", predict, Options(model=tmp_path / "x.pt", images=(tmp_path,)))


@pytest.mark.slow
def test_an_image_is_turned_upright(trained, images, tmp_path):
    """As the conversion does it."""
    loaded = load(trained[0])
    picture = Image.open(images / "val" / "class2" / "003.jpg").convert("RGB")
    picture.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif(6))
    picture.save(tmp_path / "upright.png")
    (files,) = read_batches([tmp_path / "turned.png", tmp_path / "upright.png"], loaded.transform, batch=2, workers=0)
    assert torch.equal(files[0].image, files[1].image)


@pytest.mark.slow
def test_load_says_what_it_loaded(trained):
    path, recipe = trained
    loaded = load(path)
    assert (loaded.weights, loaded.head) == ("ema", "fused_probabilities")
    assert loaded.class_names == [f"class{i}" for i in range(4)]
    assert not loaded.model.training
    assert loaded.recipe.model.embed_dim == recipe.model.embed_dim
    assert load(recipe.run.output).path == loaded.path == path
    plain = load(path, weights="model", img_size=64)
    assert plain.recipe.model.img_size == 64
    assert plain.probabilities(torch.zeros(2, 3, 64, 64)).sum(1).tolist() == pytest.approx([1, 1])
    refused("there is no recipe 'nonsense'", load, path, recipe="nonsense")
    refused("no such checkpoint", load, "none.pt")
    refused("is a folder without checkpoints", load, path.parent)


@pytest.mark.slow
def test_a_state_dict_of_timm(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("deit_tiny_patch16_224", num_classes=7).eval()
    torch.save(network.state_dict(), tmp_path / "timm.pth")
    loaded = load(tmp_path / "timm.pth", recipe="deit_tiny")
    images = torch.randn(2, 3, 224, 224)
    assert loaded.class_names is None
    assert loaded.head == "class"
    with torch.no_grad():
        assert torch.allclose(loaded.probabilities(images), network(images).softmax(-1), atol=1e-6)
