"""`fastdeit-eval` against timm's model, timm's transform and torchvision's data set."""

import json

import numpy as np
import pytest
import timm
import torch
from judges import timms_outputs, timms_transform
from timm.data.real_labels import RealLabelsImagenet
from timm.utils import accuracy
from torchvision.datasets import ImageFolder

from fastdeit import checkpoint
from fastdeit.commands.eval import Options, evaluate_checkpoint, table
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.beton import BetonDataset
from fastdeit.pipelines.formats.beton_writer import BetonWriter
from forked import run_module, succeed
from refusals import refused
from runs import newest, train
from system import run_python
from tiny_datasets import add_all


@pytest.fixture(scope="module")
def trained(tiny_in, tmp_path_factory):
    recipe = tiny_in(tmp_path_factory.mktemp("trained"), run={"epochs": 3})
    scores = train(recipe)
    return recipe, newest(recipe), scores


def judge_outputs(recipe, weights, folder):
    """timm's network and transform on the original files: outputs of each head, and labels."""
    data = ImageFolder(str(folder), timms_transform(recipe))
    images = torch.stack([image for image, _ in data])
    return timms_outputs(recipe, weights, images), torch.tensor(data.targets)


@pytest.mark.slow
def test_scores_are_those_of_timm(trained, data, images):
    recipe, path, scores = trained
    found = evaluate_checkpoint(
        Options(checkpoint=path, val=data / "val.beton", loader="torch", device="cpu", threads=1)
    )
    stored = checkpoint.load(path)
    for kind in ("model", "ema"):
        outputs, labels = judge_outputs(recipe, stored[kind], images / "val")
        expected = {head: accuracy(output, labels, (1,))[0].item() for head, output in outputs.items()}
        assert {head: found[kind][head]["top1"] for head in expected} == pytest.approx(expected)
        assert found[kind]["class"]["loss"] == pytest.approx(scores[kind]["class"]["loss"], rel=1e-5)
        assert found[kind]["images"] == 44


def with_real_labels(source, path, real):
    """A copy of the data set `source` at `path` whose sidecar holds `real`."""
    with BetonDataset(source) as data, BetonWriter(path, len(data)) as writer:
        add_all(writer, data)
        writer.finish(class_names=data.class_names, real_labels=real)
    return path


@pytest.mark.slow
def test_real_accuracy_is_timms(trained, data, images, tmp_path):
    recipe, path, _ = trained
    rng = np.random.default_rng(5)
    real = [sorted(rng.choice(4, rng.integers(0, 4), replace=False).tolist()) for _ in range(44)]
    val = with_real_labels(data / "val.beton", tmp_path / "real.beton", real)
    found = evaluate_checkpoint(Options(checkpoint=path, val=val, loader="torch", device="cpu", threads=1))

    (tmp_path / "real.json").write_text(json.dumps(real))
    files = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(44)]
    for kind in ("model", "ema"):
        outputs, _ = judge_outputs(recipe, checkpoint.load(path)[kind], images / "val")
        for head, output in outputs.items():
            judge = RealLabelsImagenet(files, tmp_path / "real.json", topk=(1,))
            judge.add_result(output)
            assert found[kind][head]["real"] == pytest.approx(judge.get_accuracy(1))
    assert found["ema"]["real_images"] == sum(bool(labels) for labels in real)
    assert "ReaL %" in table(found)


@pytest.mark.parametrize("real", [[[1]] * 43, "all", [[-1]] * 44, [["1"]] * 44, [[True]] * 44])
def test_damaged_real_labels_are_refused(trained, data, tmp_path, real):
    val = with_real_labels(data / "val.beton", tmp_path / "real.beton", real)
    with pytest.raises(UserError, match=r"real\.beton\.json: its real_labels are not"):
        evaluate_checkpoint(Options(checkpoint=trained[1], val=val, loader="torch", device="cpu", threads=1))


@pytest.mark.slow
def test_a_released_checkpoint_needs_a_recipe(trained, data, tmp_path):
    released = tmp_path / "released.pth"
    torch.save({"model": timm.create_model("deit_tiny_patch16_224", num_classes=4).state_dict()}, released)
    refused("--recipe", evaluate_checkpoint, Options(checkpoint=released, val=data / "val.beton"))
    with pytest.raises(UserError, match="no recipe 'deit'"):
        evaluate_checkpoint(Options(checkpoint=released, val=data / "val.beton", recipe="deit"))
    found = evaluate_checkpoint(
        Options(checkpoint=released, val=data / "val.beton", recipe="deit_tiny", device="cpu", threads=1, img_size=64)
    )
    assert set(found["model"]) == {"images", "class"}


@pytest.mark.slow
def test_a_head_of_other_classes_is_refused(data, tmp_path):
    released = tmp_path / "released.pth"
    torch.save({"model": timm.create_model("deit_tiny_patch16_224", num_classes=7).state_dict()}, released)
    with pytest.raises(UserError, match="cannot be evaluated"):
        evaluate_checkpoint(Options(checkpoint=released, val=data / "val.beton", recipe="deit_tiny", device="cpu"))


@pytest.mark.slow
def test_command_line(trained, data):
    _, path, _ = trained
    words = [str(path), str(data / "val.beton"), "--device", "cpu", "--json"]
    results = json.loads(succeed(run_module, "fastdeit.commands.eval", words)[0])
    assert results["ema"]["images"] == 44
    lines = table(results).splitlines()
    assert len(lines) == 1 + 2 * 4
    assert f"{results['model']['class']['top1']:.2f}" in lines[1]
    wrong = run_python("-m", "fastdeit.commands.eval", "missing.pt", "x.beton", status=2)
    assert "missing.pt" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_a_runs_folder_stands_for_its_newest_checkpoint(trained, data, capsys):
    recipe, path, _ = trained
    options = {"val": data / "val.beton", "loader": "torch", "device": "cpu", "weights": "model"}
    found = evaluate_checkpoint(Options(checkpoint=recipe.run.output, **options))
    assert f"the newest checkpoint of the run: {path}" in capsys.readouterr().out
    assert found == evaluate_checkpoint(Options(checkpoint=path, **options))
