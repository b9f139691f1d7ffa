"""Classifiers on frozen features against scikit-learn's, and features against timm's."""

import shutil

import numpy as np
import pytest
import timm
import torch
from judges import timms_transform
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torchvision.datasets import ImageFolder

from fastdeit import checkpoint
from fastdeit.commands.eval import Options, evaluate_checkpoint
from fastdeit.pipelines.errors import UserError
from fastdeit.training import probes
from fastdeit.training.probes import KNN, LINEAR, TEMPERATURE, knn_scores, linear_classifier, probe
from refusals import refused
from runs import evaluated, newest, train
from tiny_datasets import reseal, some_classes


def clusters(seed, count=200, classes=6):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, 10, generator=torch.Generator().manual_seed(9))
    return centres[labels] + torch.randn(count, 10, generator=generator), labels


@pytest.mark.parametrize("neighbours", [1, 20, 1000])
def test_the_nearest_neighbours_are_scikit_learns(neighbours):
    (rows, labels), (others, _) = clusters(0), clusters(1)
    votes = knn_scores(rows.double(), labels, others.double(), 6, neighbours)
    judge = KNeighborsClassifier(
        min(neighbours, len(rows)), metric="cosine", weights=lambda d: np.exp((1 - d) / TEMPERATURE)
    ).fit(rows.double(), labels)
    expected = judge.predict_proba(others.double())
    votes = votes.clamp_min(0)
    np.testing.assert_allclose((votes / votes.sum(1, keepdim=True)).numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("strength", [0.05, 1.0])
def test_the_linear_classifier_is_scikit_learns(strength):
    (rows, labels), (others, _) = clusters(0), clusters(1)
    ours = linear_classifier(rows, labels, 6, strength=strength)
    judge = LogisticRegression(C=strength, max_iter=2000, tol=1e-8).fit(rows.double(), labels)
    mine = ours(others).detach().softmax(1).numpy()
    np.testing.assert_allclose(mine, judge.predict_proba(others.double()), atol=1e-3)


def test_scores_of_a_class_that_no_training_image_has():
    (rows, labels), (others, targets) = clusters(0), clusters(1)
    few = labels < 5
    found = probe((rows[few], labels[few]), (others, targets), 6)
    most = 100 * (targets < 5).double().mean().item()
    assert found.keys() == {KNN, LINEAR}
    assert all(50 < scores["top1"] <= most for scores in found.values())
    assert found[KNN]["top5"] <= most + 1e-9  # a class without votes is no guess


@pytest.mark.slow
@pytest.mark.parametrize("distilled", [False, True])
def test_the_command_scores_timms_features(tiny, data, images, distilled):
    recipe = tiny(model={"distilled": distilled})
    train(recipe)
    path = newest(recipe)
    options = {"loader": "torch", "device": "cpu", "threads": 1, "weights": "model"}
    found = evaluated(path, data / "val.beton", probe=data / "train.beton", **options)["model"]
    name = "deit_tiny_distilled_patch16_224" if distilled else "deit_tiny_patch16_224"
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
    judge = timm.create_model(name, num_classes=4, **shape).eval()
    judge.load_state_dict(checkpoint.load(path)["model"])
    both = []
    for split in ("train", "val"):
        folder = ImageFolder(str(images / split), timms_transform(recipe))
        with torch.no_grad():
            tokens = judge.forward_features(torch.stack([image for image, _ in folder]))
        both.append((tokens[:, : 1 + distilled].flatten(1), torch.tensor(folder.targets)))
    (rows, labels), (others, targets) = both
    near = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / TEMPERATURE)).fit(rows, labels)
    assert found[KNN]["top1"] == pytest.approx(100 * near.score(others, targets), abs=100 / 44)
    scale = rows.std(0), rows.mean(0)
    linear = LogisticRegression(max_iter=5000).fit((rows - scale[1]) / scale[0], labels)
    expected = 100 * linear.score((others - scale[1]) / scale[0], targets)
    assert found[LINEAR]["top1"] == pytest.approx(expected, abs=100 / 44)
    assert found["class"].keys() == {"top1", "top5", "loss", "ece"}


def test_other_classes_are_refused_before_anything_is_computed(data, teacher_checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"missing.*"):
        evaluated(teacher_checkpoint, data / "val.beton", probe=tmp_path / "missing.beton")
    for name in ("train.beton", "train.beton.json"):
        shutil.copy(data / name, tmp_path / name)
    reseal(tmp_path / "train.beton.json", class_names=["a", "b", "c", "d"])
    with pytest.raises(UserError, match=r"train\.beton and .*val\.beton do not name the same classes"):
        evaluated(teacher_checkpoint, data / "val.beton", probe=tmp_path / "train.beton")


@pytest.mark.slow
def test_the_probe_learns_only_the_classes_of_the_scored_data_set(tiny, data, tmp_path):
    recipe = tiny()
    train(recipe)
    options = {"loader": "torch", "device": "cpu", "threads": 1, "weights": "model"}
    names = ["class3", "class0"]
    few, of_few = (
        some_classes(data / f"{split}.beton", tmp_path / f"{split}.beton", names) for split in ("val", "train")
    )
    found = evaluated(recipe.run.output, few, probe=data / "train.beton", **options)["model"]
    expected = evaluated(recipe.run.output, few, probe=of_few, **options)["model"]
    assert found[KNN] == expected[KNN]
    assert found[LINEAR]["top1"] == pytest.approx(expected[LINEAR]["top1"], abs=100 / 22)
    refused("do not name the same classes", evaluated, recipe.run.output, data / "val.beton", probe=of_few, **options)
    others = some_classes(data / "train.beton", tmp_path / "others.beton", ["class1", "class2"])
    reseal(tmp_path / "others.beton.json", class_names=["class1", "class2", "class0", "class3"])
    refused("has no images of the classes of", evaluated, recipe.run.output, few, probe=others, **options)


def test_one_image_trains_a_probe():
    rows, labels = clusters(0)
    found = probe((rows[:1], labels[:1]), (rows, labels), 6)
    assert found[KNN]["top1"] == pytest.approx(100 * (labels == labels[0]).float().mean().item())


@pytest.mark.slow
def test_the_probe_is_trained_once_for_all_data_sets(data, teacher_checkpoint, monkeypatch, capsys):
    counted, whole = [], probes.features
    monkeypatch.setattr(probes, "features", lambda *given, **named: counted.append(1) or whole(*given, **named))
    options = {"loader": "torch", "device": "cpu", "threads": 1, "weights": "model", "probe": data / "train.beton"}
    sets = (data / "val.beton", data / "train.beton")
    found = evaluate_checkpoint(Options(checkpoint=teacher_checkpoint, val=sets, **options))
    assert len(counted) == 3
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: --probe")]
    assert f"has the images of {sets[1]}: the probes are scored on what they were trained on" in warning
    assert found[str(sets[0])] == evaluated(teacher_checkpoint, sets[0], **options)


@pytest.mark.slow
def test_held_out_images_train_no_probe(tiny, data, monkeypatch, capsys):
    """Though the command names the run's own training set: 120 images train the probe, 40 are scored."""
    recipe = tiny(data={"val": None, "hold_out": 0.25, "repeats": 1}, run={"epochs": 1})
    train(recipe)
    seen, whole = [], probes.features
    monkeypatch.setattr(probes, "features", lambda *given, **named: seen.append(whole(*given, **named)) or seen[-1])
    options = {"loader": "torch", "device": "cpu", "threads": 1, "weights": "model", "probe": data / "train.beton"}
    found = evaluated(recipe.run.output, **options)["model"]
    assert [len(labels) for _, labels in seen] == [120, 40]
    assert (found["images"], found[KNN]["top1"] > 0) == (40, True)
    assert "the images that the run held out are left out" in capsys.readouterr().out
