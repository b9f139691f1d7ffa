"""`fastdeit-eval` against timm's model, timm's transform and torchvision's data set."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from judges import timms_outputs, timms_transform
from sklearn.metrics import classification_report
from timm.data.real_labels import RealLabelsImagenet
from timm.utils import accuracy
from torchmetrics.functional.classification import multiclass_calibration_error
from torchvision.datasets import ImageFolder

from fastdeit import checkpoint
from fastdeit.commands import corruptions
from fastdeit.commands.corruptions import corrupted_sets, corruption_table
from fastdeit.commands.eval import Options, evaluate_checkpoint, table, tables
from fastdeit.commands.eval import main as eval_main
from fastdeit.kernels.reference import HEADS
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.beton import BetonDataset
from fastdeit.pipelines.formats.beton_writer import BetonWriter
from forked import run_module, succeed
from refusals import refused
from runs import evaluated, newest, train
from system import run_python
from tiny_datasets import add_all, reseal, some_classes


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
    found = evaluated(checkpoint=path, val=data / "val.beton", loader="torch", device="cpu", threads=1)
    stored = checkpoint.load(path)
    for kind in ("model", "ema"):
        outputs, labels = judge_outputs(recipe, stored[kind], images / "val")
        expected = {head: accuracy(output, labels, (1,))[0].item() for head, output in outputs.items()}
        assert {head: found[kind][head]["top1"] for head in expected} == pytest.approx(expected)
        sure = {head: output / 2 if "prob" in head else output.softmax(-1) for head, output in outputs.items()}
        expected = {
            head: 100 * multiclass_calibration_error(each, labels, each.shape[1], n_bins=15).item()
            for head, each in sure.items()
        }
        assert {head: found[kind][head]["ece"] for head in expected} == pytest.approx(expected, rel=1e-4)
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
    found = evaluated(checkpoint=path, val=val, loader="torch", device="cpu", threads=1)

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
        evaluated(checkpoint=trained[1], val=val, loader="torch", device="cpu", threads=1)


@pytest.mark.slow
def test_a_released_checkpoint_needs_a_recipe(trained, data, tmp_path):
    released = tmp_path / "released.pth"
    torch.save({"model": timm.create_model("deit_tiny_patch16_224", num_classes=4).state_dict()}, released)
    refused("--recipe", evaluated, checkpoint=released, val=data / "val.beton")
    refused("no recipe 'deit'", evaluated, checkpoint=released, val=data / "val.beton", recipe="deit")
    found = evaluated(
        checkpoint=released, val=data / "val.beton", recipe="deit_tiny", device="cpu", threads=1, img_size=64
    )
    assert set(found["model"]) == {"images", "class"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value", "least"), [("batch", 0, 1), ("threads", -1, 0)])
def test_numbers_that_are_too_small_are_refused_by_their_option(trained, data, name, value, least):
    refused(f"--{name} {value}: give at least {least}", evaluated, trained[1], data / "val.beton", **{name: value})


@pytest.mark.slow
def test_a_head_of_other_classes_is_refused(data, tmp_path):
    released = tmp_path / "released.pth"
    torch.save({"model": timm.create_model("deit_tiny_patch16_224", num_classes=7).state_dict()}, released)
    with pytest.raises(UserError, match="cannot be evaluated"):
        evaluated(checkpoint=released, val=data / "val.beton", recipe="deit_tiny", device="cpu")


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
def test_scores_of_each_class_are_scikit_learns(trained, data, images, tmp_path):
    recipe, path, _ = trained
    out = tmp_path / "classes.csv"
    words = [str(path), str(data / "val.beton"), "--device", "cpu", "--per-class", str(out)]
    printed, _ = succeed(run_module, "fastdeit.commands.eval", words)
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == 2 * BetonDataset(data / "val.beton").class_names
    assert {row["weights"] for row in rows} == {"model", "ema"}
    total = sum(int(row["images"]) * float(row["class top-1"]) for row in rows[:4]) / 44
    assert f"{total:.1f}" in printed
    outputs, labels = judge_outputs(recipe, checkpoint.load(path)["ema"], images / "val")
    report = classification_report(labels, outputs["class"].argmax(1), output_dict=True, zero_division=0)
    for label, row in enumerate(rows[4:]):
        assert float(row["class top-1"]) == pytest.approx(100 * report[str(label)]["recall"], abs=0.01)
        assert int(row["images"]) == report[str(label)]["support"]
    before = out.read_bytes()
    refused("exists already", evaluate_checkpoint, Options(checkpoint=path, val=(data / "val.beton",), per_class=out))
    assert out.read_bytes() == before
    other = tmp_path / "other.csv"
    (tmp_path / "other.csv.tmp").write_text("somebody's")
    for name, reason in ((other, r"other.csv.tmp exists already"), (tmp_path / ("x" * 254), "name is too long")):
        refused(reason, evaluate_checkpoint, Options(checkpoint=path, val=(data / "val.beton",), per_class=name))


@pytest.mark.slow
def test_mean_corruption_error_of_the_papers_formula(trained, data, tmp_path, monkeypatch, capsys):
    """Two corruptions in the place of 15; each severity is the validation set with other images left out."""
    monkeypatch.setattr(corruptions, "ALEXNET", {"snow": 0.8, "fog": 0.5})
    path, folder, top1 = trained[1], tmp_path / "c", {}
    shared = {"loader": "torch", "device": "cpu", "threads": 1, "weights": "model"}
    with BetonDataset(data / "val.beton") as val:
        for number, name in enumerate(("snow", "fog")):
            (folder / name).mkdir(parents=True)
            for severity in range(1, 6):
                beton, first = folder / name / f"{severity}.beton", number + severity
                with BetonWriter(beton, len(val) - first) as writer:
                    add_all(writer, val, first)
                    writer.finish(class_names=val.class_names)
                scores = evaluated(checkpoint=path, val=beton, **shared)["model"]
                top1[name, severity] = np.array([scores[head]["top1"] for head in HEADS])
    monkeypatch.setattr(
        "sys.argv", ["fastdeit-eval", str(path), "--corruptions", str(folder), "--json", "--device=cpu"]
    )
    capsys.readouterr()
    eval_main()
    printed = json.loads(capsys.readouterr().out)
    found = printed.pop("corruptions")["model"]
    assert printed["data"].keys() == {
        str(folder / name / f"{i}.beton") for name in ("snow", "fog") for i in range(1, 6)
    }
    snow, fog = (sum(100 - top1[name, severity] for severity in range(1, 6)) for name in ("snow", "fog"))
    for i, head in enumerate(HEADS):
        assert found[head]["mce"] == pytest.approx(100 * (snow[i] / (5 * 80) + fog[i] / (5 * 50)) / 2)
        assert found[head]["error"] == pytest.approx((snow[i] + fog[i]) / 10)
    text = corruption_table({"model": found}).splitlines()
    assert text[1 + 3].split() == ["model", "fused_logits", f"{found['fused_logits']['error']:.2f}",
                                   f"{found['fused_logits']['mce']:.2f}"]  # fmt: skip
    assert text[-1].split()[0] == "fog"
    (folder / "fog" / "2.beton").unlink()
    refused("there is no .*fog.2 .1 of 10 are missing", corrupted_sets, folder)
    assert text[-1].split()[-1] == f"{found['fused_probabilities']['corruptions']['fog']['ce']:.1f}"


@pytest.mark.slow
def test_a_runs_folder_stands_for_its_newest_checkpoint(trained, data, capsys):
    recipe, path, _ = trained
    options = {"val": data / "val.beton", "loader": "torch", "device": "cpu", "weights": "model"}
    found = evaluated(checkpoint=recipe.run.output, **options)
    assert f"the newest checkpoint of the run: {path}" in capsys.readouterr().out
    assert found == evaluated(checkpoint=path, **options)


@pytest.mark.slow
def test_several_data_sets(trained, data, capsys):
    path = trained[1]
    options = {"loader": "torch", "device": "cpu", "threads": 1}
    both = (data / "val.beton", data / "train.beton")
    found = evaluate_checkpoint(Options(checkpoint=path, val=both, **options))
    assert found == {str(one): evaluated(path, one, **options) for one in both}
    assert [scores["model"]["images"] for scores in found.values()] == [44, 160]
    assert tables(found).count("fused_probabilities") == 4
    assert f"{both[1]}\nweights" in tables(found)
    refused("is named twice", evaluate_checkpoint, Options(checkpoint=path, val=(both[0], both[0])))


@pytest.mark.slow
def test_a_data_set_with_some_of_the_classes(trained, data, images, tmp_path, capsys):
    """As ImageNet-A and ImageNet-R have them, in any order: the judge leaves out the other columns."""
    recipe, path, _ = trained
    few = some_classes(data / "val.beton", tmp_path / "few.beton", ["class3", "class0"])
    found = evaluated(path, few, loader="torch", device="cpu", threads=1)["model"]
    assert "has 2 of the network's 4 classes: the others are ignored" in capsys.readouterr().out
    outputs, labels = judge_outputs(recipe, checkpoint.load(path)["model"], images / "val")
    chosen = (labels == 0) | (labels == 3)
    targets = (labels[chosen] == 0).long()
    for head in ("class", "distillation"):
        scores = outputs[head][chosen][:, [3, 0]]
        assert found[head]["top1"] == pytest.approx(accuracy(scores, targets, (1,))[0].item())
    assert found["images"] == int(chosen.sum())
    other = some_classes(data / "val.beton", tmp_path / "other.beton", ["class1"])
    reseal(tmp_path / "other.beton.json", class_names=["unknown"])
    refused("do not name the same classes", evaluated, path, other, device="cpu")


@pytest.mark.slow
def test_a_timm_model_is_scored_with_its_own_preprocessing(data, images, tmp_path, capsys):
    torch.manual_seed(0)
    judge = timm.create_model("resnet18.a1_in1k", num_classes=4).eval()
    torch.save(judge.state_dict(), tmp_path / "teacher.pth")
    found = evaluated(
        tmp_path / "teacher.pth", data / "val.beton", arch="resnet18.a1_in1k", loader="torch", device="cpu"
    )
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(judge), is_training=False)
    folder = ImageFolder(str(images / "val"), transform)
    with torch.no_grad():
        output = judge(torch.stack([image for image, _ in folder]))
    assert found["model"]["class"]["top1"] == pytest.approx(
        accuracy(output, torch.tensor(folder.targets), (1,))[0].item()
    )
    assert found["model"]["class"]["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(output, torch.tensor(folder.targets)).item(), rel=1e-4
    )
    with pytest.raises(UserError, match="--arch resnet1000 is not a model that timm has a configuration for"):
        evaluated(tmp_path / "teacher.pth", data / "val.beton", arch="resnet1000")
    with pytest.raises(UserError, match="exclude each other"):
        evaluated(tmp_path / "teacher.pth", data / "val.beton", arch="resnet18", recipe="deit_tiny")


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, -1])
def test_a_checkpoint_without_names_has_those_of_the_largest_data_set(trained, data, tmp_path, order):
    """As a timm checkpoint has none; a data set whose names say nothing is refused."""
    _, path, _ = trained
    named, nameless = checkpoint.load(path), tmp_path / "nameless.pth"
    torch.save({"model": named["model"], "recipe": named["recipe"], "num_classes": 4}, nameless)
    few = some_classes(data / "val.beton", tmp_path / "few.beton", ["class3", "class0"])
    sets, options = (data / "val.beton", few)[::order], {"loader": "torch", "device": "cpu", "threads": 1}
    expected = evaluate_checkpoint(Options(checkpoint=path, val=sets, weights="model", **options))
    assert evaluate_checkpoint(Options(checkpoint=nameless, val=sets, weights="model", **options)) == expected
    with pytest.raises(UserError, match=r"few\.beton has 2 classes, the network 4, and their names do not say which"):
        evaluated(nameless, few, **options)


@pytest.mark.slow
def test_real_accuracy_of_some_of_the_classes(trained, data, tmp_path):
    """ReaL's labels number all classes: with the true class as the only label, ReaL accuracy is top-1."""
    names = ["class3", "class0"]
    few = some_classes(data / "val.beton", tmp_path / "few.beton", names)
    with BetonDataset(few) as own:
        real = [[int(names[label][-1])] for label in own.label]
    scores = evaluated(trained[1], with_real_labels(few, tmp_path / "real.beton", real), loader="torch", device="cpu")
    assert scores["model"]["class"]["real"] == pytest.approx(scores["model"]["class"]["top1"])
    assert scores["model"]["real_images"] == scores["model"]["images"] > 0
