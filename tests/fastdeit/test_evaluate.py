"""`fastdeit-eval` against timm's model, timm's transform and torchvision's data set."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from timm.data import create_transform
from timm.utils import accuracy
from torchvision.datasets import ImageFolder

from fastdeit import checkpoint
from fastdeit.cli import UserError
from fastdeit.distributed import world
from fastdeit.evaluate import Options, evaluate_checkpoint, table
from fastdeit.trainer import Trainer


@pytest.fixture
def trained(tiny):
    recipe = tiny(run={"epochs": 3})
    with world("cpu") as joined:
        scores = Trainer(recipe, joined).run()
    return recipe, checkpoint.found(recipe.run.output / "checkpoints")[0], scores


def judged(recipe, weights, folder):
    """timm's network and transform on the original files: top-1 of the class head, of the mean of the logits."""
    m = recipe.model
    network = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        img_size=m.img_size,
        patch_size=m.patch_size,
        embed_dim=m.embed_dim,
        depth=m.depth,
        num_heads=m.num_heads,
        num_classes=4,
    ).eval()
    network.load_state_dict(weights, strict=True)
    transform = create_transform(
        m.img_size, is_training=False, interpolation="bicubic", crop_pct=recipe.augment.eval_crop
    )
    data = ImageFolder(str(folder), transform)
    images = torch.stack([image for image, _ in data])
    labels = torch.tensor(data.targets)
    with torch.no_grad():
        tokens = network.forward_features(images)
        heads = network.head(tokens[:, 0]), network.head_dist(tokens[:, 1])
        fused = network(images)
    return {
        "class": accuracy(heads[0], labels, (1,))[0].item(),
        "distillation": accuracy(heads[1], labels, (1,))[0].item(),
        "fused_logits": accuracy(fused, labels, (1,))[0].item(),
        "fused_probabilities": accuracy(heads[0].softmax(-1) + heads[1].softmax(-1), labels, (1,))[0].item(),
    }


def test_scores_are_those_of_timm(trained, data, images):
    recipe, path, scores = trained
    found = evaluate_checkpoint(
        Options(checkpoint=path, val=data / "val.beton", loader="torch", device="cpu", threads=1)
    )
    stored = checkpoint.load(path)
    for kind in ("model", "ema"):
        expected = judged(recipe, stored[kind], images / "val")
        assert {head: found[kind][head]["top1"] for head in expected} == pytest.approx(expected)
        assert found[kind]["class"]["loss"] == pytest.approx(scores[kind]["class"]["loss"], rel=1e-5)
        assert found[kind]["images"] == 44


def test_a_released_checkpoint_needs_a_recipe(trained, data, tmp_path):
    released = tmp_path / "released.pth"
    torch.save({"model": timm.create_model("deit_tiny_patch16_224", num_classes=4).state_dict()}, released)
    with pytest.raises(UserError, match="--recipe"):
        evaluate_checkpoint(Options(checkpoint=released, val=data / "val.beton"))
    with pytest.raises(UserError, match="no recipe 'deit'"):
        evaluate_checkpoint(Options(checkpoint=released, val=data / "val.beton", recipe="deit"))
    found = evaluate_checkpoint(
        Options(checkpoint=released, val=data / "val.beton", recipe="deit_tiny", device="cpu", threads=1, img_size=64)
    )
    assert set(found["model"]) == {"images", "class"}


def test_a_head_of_other_classes_is_refused(data, tmp_path):
    released = tmp_path / "released.pth"
    torch.save({"model": timm.create_model("deit_tiny_patch16_224", num_classes=7).state_dict()}, released)
    with pytest.raises(UserError, match="cannot be evaluated"):
        evaluate_checkpoint(Options(checkpoint=released, val=data / "val.beton", recipe="deit_tiny", device="cpu"))


def test_command_line(trained, data):
    _, path, _ = trained
    command = [sys.executable, "-m", "fastdeit.evaluate", str(path), str(data / "val.beton"), "--device", "cpu"]
    out = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
    results = json.loads(out)
    assert results["ema"]["images"] == 44
    lines = table(results).splitlines()
    assert len(lines) == 1 + 2 * 4
    assert f"{results['model']['class']['top1']:.2f}" in lines[1]
    wrong = subprocess.run([*command[:3], "missing.pt", "x.beton"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "missing.pt" in wrong.stderr
    assert "Traceback" not in wrong.stderr
