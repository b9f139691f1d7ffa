"""`fastdeit export`: timm, transformers, onnxruntime and torch.export load it, and give the model's results."""

import json
import shutil

import pytest
import timm
import torch

from fastdeit.commands import export as command
from fastdeit.commands.export import Options, export
from fastdeit.exporting import FORMATS, Classifier
from fastdeit.loading import load
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.machine import MachineError
from fastdeit.recipes import convnet_teacher, deit3_small, deit_tiny
from pictures import picture
from refusals import refused
from runs import newest, train
from system import run_python

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
PICTURE = picture(0, (70, 50), blur=0)


@pytest.fixture(scope="module")
def trained(tiny_in, tmp_path_factory):
    """Checkpoints of a distilled student, a plain one, a DeiT III and a convnet."""
    paths = {}
    bases = {"distilled": None, "plain": deit_tiny, "deit3": deit3_small, "convnet": convnet_teacher}
    for name, base in bases.items():
        recipe = tiny_in(tmp_path_factory.mktemp(name) / "run", base, run={"epochs": 1})
        train(recipe)
        paths[name] = newest(recipe)
    return paths


def logits_mean(loaded):
    """Log-probabilities of the mean logits, as timm and transformers decide."""
    with torch.no_grad():
        output = loaded.model(IMAGES)
        logits = output.cls if output.dist is None else (output.cls + output.dist) / 2
    return logits.log_softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distilled", "plain", "deit3", "convnet"])
def test_timm_loads_it(trained, tmp_path, kind):
    export(Options(checkpoint=trained[kind], dest=tmp_path))
    loaded, folder = load(trained[kind]), tmp_path / "timm"
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.allclose(network(IMAGES).log_softmax(-1), logits_mean(loaded), atol=1e-5)
    data = timm.data.resolve_model_data_config(network)
    assert torch.equal(timm.data.create_transform(**data, is_training=False)(PICTURE), loaded.transform(PICTURE))
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == [f"class{i}" for i in range(4)]
    card = (folder / "README.md").read_text()
    head = "fused_probabilities" if kind == "distilled" else "class"
    assert f"| {head} | " in card


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "format"), [("distilled", "onnx"), ("convnet", "torch")])
def test_programs_give_the_probabilities(trained, tmp_path, kind, format):
    export(Options(checkpoint=trained[kind], dest=tmp_path, formats=(format,)))
    expected = load(trained[kind]).probabilities(IMAGES)
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
        (found,) = session.run(None, {"images": IMAGES.numpy()})
        found = torch.from_numpy(found)
    else:
        with torch.no_grad():
            found = torch.export.load(tmp_path / "torch" / "model.pt2").module()(IMAGES)
    assert torch.allclose(found.exp(), expected, atol=1e-4)
    described = json.loads((tmp_path / format / "preprocessing.json").read_text())
    assert described["class_names"] == [f"class{i}" for i in range(4)]
    assert described["center_crop"] == 32


TRANSFORMERS = """
import sys, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, DeiTForImageClassificationWithTeacher

for kind, model_class in (
    ("distilled", DeiTForImageClassificationWithTeacher), ("plain", AutoModelForImageClassification)
):
    folder = f"{kind}/transformers"
    model, loading = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    with torch.no_grad():
        logits = model.eval()(torch.load("images.pt")).logits
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(Image.open("picture.png"), return_tensors="pt")["pixel_values"][0]
    torch.save([logits.log_softmax(-1), pixels, list(model.config.id2label.values())], f"{kind}.pt")
"""


@pytest.mark.slow
def test_transformers_loads_it(trained, tmp_path):
    PICTURE.save(tmp_path / "picture.png")
    torch.save(IMAGES, tmp_path / "images.pt")
    for kind in ("distilled", "plain"):
        export(Options(checkpoint=trained[kind], dest=tmp_path / kind, formats=("transformers",)))
    # In another folder: transformers looks for a package `kernels`, and would find this checkout's.
    run_python("-c", TRANSFORMERS, cwd=tmp_path, status=0)
    for kind in ("distilled", "plain"):
        loaded, (found, pixels, names) = load(trained[kind]), torch.load(tmp_path / f"{kind}.pt")
        assert torch.allclose(found, logits_mean(loaded), atol=1e-5)
        # Its processors resize tensors with torchvision, which rounds differently from Pillow.
        assert (pixels - loaded.transform(PICTURE)).abs().max() < 0.05
        assert names == [f"class{i}" for i in range(4)]


@pytest.mark.slow
def test_nothing_is_overwritten_and_nothing_half_is_left(trained, tmp_path, monkeypatch):
    path = trained["plain"]
    (tmp_path / "timm").mkdir()
    refused(r"timm: is there already", export, Options(checkpoint=path, dest=tmp_path))
    monkeypatch.setattr("fastdeit.exporting.Classifier.forward", lambda self, images: self.model(images).cls * 2)
    refused(r"differ by .* from the model's", export, Options(checkpoint=path, dest=tmp_path, formats=("torch",)))
    assert [each.name for each in tmp_path.iterdir()] == ["timm"]


@pytest.mark.slow
def test_an_export_is_an_error_if_another_wrote_the_folder_first(trained, tmp_path, monkeypatch):
    def overtaken(loaded, folder):
        (tmp_path / "timm").mkdir()
        (tmp_path / "timm" / "other").write_text("of the other")

    monkeypatch.setitem(FORMATS, "timm", overtaken)
    options = Options(checkpoint=trained["plain"], dest=tmp_path, formats=("timm",))
    refused(r"timm has been written by another program since this export began", export, options)
    assert [str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*")] == ["timm", "timm/other"]


def test_mistakes(tmp_path):
    refused("no such checkpoint", export, Options(checkpoint=tmp_path / "none.pt", dest=tmp_path))


def test_layouts_that_others_do_not_have_are_refused(trained, tmp_path, tiny):
    options = Options(checkpoint=trained["deit3"], dest=tmp_path / "a", formats=("transformers",))
    refused("transformers has no DeiT with LayerScale or without", export, options)
    recipe = tiny(deit3_small, model={"distilled": True}, run={"epochs": 1})
    train(recipe)
    options = Options(checkpoint=newest(recipe), dest=tmp_path / "b", formats=("timm",))
    refused("timm has no model with a distillation token without a position", export, options)


def test_a_convnet_has_no_layout_in_transformers(trained, tmp_path):
    with pytest.raises(UserError, match="has no layout in transformers"):
        export(Options(checkpoint=trained["convnet"], dest=tmp_path, formats=("transformers",)))
    assert list(tmp_path.iterdir()) == []


def test_scores_come_from_the_log_of_the_run(tmp_path):
    path = tmp_path / "checkpoints" / "checkpoint-000000005.pt"
    assert command.stored_scores(path, "ema") is None
    scores = {"class": {"top1": 50.0, "top5": 90.0, "loss": 1.0}}
    events = [
        {"event": "eval", "global_step": 5, "weights": "model", **scores},
        {"event": "eval", "global_step": 5, "weights": "ema", "images": 4, "class": {"top1": 60.0, "top5": 91.0}},
        {"event": "eval", "global_step": 6, "weights": "ema", **scores},
    ]
    (tmp_path / "log.jsonl").write_text("no json\n" + "\n".join(map(json.dumps, events)) + "\n[]\n")
    assert command.stored_scores(path, "ema") == {"class": {"top1": 60.0, "top5": 91.0}}
    assert command.stored_scores(tmp_path / "checkpoints" / "best.pt", "ema") is None


def test_the_classifier_is_what_predict_uses(trained):
    loaded = load(trained["distilled"])
    with torch.no_grad():
        assert torch.allclose(Classifier(loaded)(IMAGES).exp(), loaded.probabilities(IMAGES), atol=1e-6)


@pytest.mark.slow
def test_a_disk_without_room_is_told_before_anything_is_written(trained, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=200_000))
    with pytest.raises(MachineError, match=r"the export takes .* has only 0\.0 GB free: .* another DEST"):
        export(Options(checkpoint=trained["plain"], dest=tmp_path / "x"))
    assert list((tmp_path / "x").iterdir()) == []
