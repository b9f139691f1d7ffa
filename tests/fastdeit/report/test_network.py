"""What a report says of a checkpoint; the judges are timm's network, scikit-learn and PyTorch on hooks."""

import numpy as np
import pytest
import torch
from judges import timms_network, timms_outputs, timms_transform
from PIL import Image

from fastdeit import checkpoint
from fastdeit.data import TrainingData
from fastdeit.distributed import world
from fastdeit.inputs import open_dataset
from fastdeit.loading import Loaded, load
from fastdeit.model.deit import token_cosines
from fastdeit.model.networks import build_network
from fastdeit.recipes import convnet_teacher, deit_base, deit_small, deit_tiny
from fastdeit.report.network import SAMPLES, affordable, chosen_checkpoint, look
from fastdeit.report.pictures import Missing
from fastdeit.report.runs import read_run
from fastdeit.report.tokens import attention_maps, look_at_tokens
from fastdeit.subsets import divide, spaced
from fastdeit.training.evaluation import headline_head
from runs import changed, final_state, opened, train

IMAGES = 21


@pytest.fixture(scope="module")
def found(reported):
    with world("cpu") as joined:
        return look(read_run(reported.run.output), joined, images=IMAGES, batch=8)


@pytest.fixture(scope="module")
def judge(reported, images):
    """The evaluated images as timm makes them, their labels, and the weights that were evaluated."""
    files = sorted((images / "val").rglob("*.jpg"))
    chosen = [files[i] for i in spaced(len(files), IMAGES)]
    transform = timms_transform(reported)
    batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in chosen])
    path, kind = chosen_checkpoint(read_run(reported.run.output))
    return batch, [int(path.parent.name[-1]) for path in chosen], checkpoint.load(path)[kind]


@pytest.mark.slow
def test_confusions_are_those_of_timms_network(found, judge, reported):
    from sklearn.metrics import confusion_matrix  # here: it takes two seconds

    batch, labels, weights = judge
    decided = timms_outputs(reported, weights, batch)["fused_probabilities"].argmax(1)
    judged = found.judged
    expected = confusion_matrix(labels, decided, labels=range(4))
    assert judged.confusion().tolist() == expected.tolist()
    assert judged.top1 == pytest.approx(100 * expected.trace() / IMAGES)
    assert (len(judged.index), judged.of) == (IMAGES, 44)
    pairs = {(a, b): (times, of) for a, b, times, of in judged.confused(99)}
    names = judged.names
    for row, column in np.argwhere(expected - np.diag(expected.diagonal())):
        assert pairs.pop((names[row], names[column])) == (expected[row, column], expected[row].sum())
    assert not pairs
    shares = expected.diagonal() / expected.sum(1)
    for each in judged.worst:
        row = names.index(each.name)
        assert (each.hits, each.images) == (expected[row, row], expected[row].sum())
        assert len(each.mistakes) == min(6, each.images - each.hits)
    assert [shares[names.index(each.name)] for each in judged.worst] == sorted(share for share in shares if share < 1)


@pytest.mark.slow
def test_attention_is_timms(judge, reported):
    batch, _, weights = judge
    network, seen = timms_network(reported, weights), []
    network.blocks[-1].attn.fused_attn = False
    network.blocks[-1].attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        network(batch)
    expected = seen[0].mean(1)[:, :2, 2:]  # (B, tokens, patches)
    loaded = load(chosen_checkpoint(read_run(reported.run.output))[0])
    maps = attention_maps(loaded.model, batch)
    assert maps.shape == (2, IMAGES, 4, 4)
    assert torch.allclose(maps.flatten(2), expected.transpose(0, 1), atol=1e-6)
    assert not torch.allclose(maps[0], maps[1], atol=1e-4)


@pytest.mark.slow
def test_cosines_are_those_of_timms_tokens(found, judge, reported):
    batch, _, weights = judge
    network, tokens = timms_network(reported, weights), []
    network.blocks[0].register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0]))
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    with torch.no_grad():
        network(batch[spaced(IMAGES, 8)])
    a, b = (torch.stack([layer[:, row] for layer in tokens]) for row in (0, 1))
    expected = ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean(1)
    assert found.judged.cosines == pytest.approx(expected.tolist(), abs=1e-5)
    assert found.judged.token_images == 8
    assert token_cosines([torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])]) == pytest.approx([0.5**0.5])


@pytest.mark.slow
def test_samples_are_those_that_were_trained_on(found, reported):
    train_set = open_dataset(reported.data.train)
    with opened(TrainingData, reported, train_set) as data, data.batches(0) as batches:
        batch = next(iter(batches)).data
    assert reported.departures.mix_group < SAMPLES
    first = batch.images[:SAMPLES]
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (reported.augment.mean, reported.augment.std))
    expected = ((first * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack([each.pixels for each in found.samples]), expected)
    for sample, label in zip(found.samples, batch.label_a, strict=False):
        assert sample.caption.startswith(train_set.class_names[label])
    train_set.close()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "val"])
def test_data_that_are_elsewhere(reported, tmp_path, part):
    """The part of the page that needs them says so; a path may be relative to where the run was started."""
    run = read_run(reported.run.output)
    state = final_state(reported)
    here = changed(reported, data={"train": "train.beton", "val": "val.beton", part: tmp_path / "gone.beton"})
    folder = tmp_path / "run" / "checkpoints"
    checkpoint.save(folder / "checkpoint-000000010.pt", {**state, "recipe": here.to_dict()})
    run.folder, run.best, run.record = tmp_path / "run", None, {"starts": [{"folder": str(reported.data.train.parent)}]}
    with world("cpu") as joined:
        found = look(run, joined, images=4, batch=4)
    lost, there = (found.samples, found.judged) if part == "train" else (found.judged, found.samples)
    assert lost == Missing(
        f"the run's data.{part}, {tmp_path}/gone.beton, does not exist: put it back, or evaluate on another data set"
    )
    assert not isinstance(there, Missing)


def test_a_run_without_checkpoints(reported, tmp_path):
    run = read_run(reported.run.output)
    run.folder = tmp_path
    with world("cpu") as joined:
        found = look(run, joined, images=4, batch=4)
    assert found.judged == found.samples == Missing(f"{tmp_path}/checkpoints: there is no checkpoint yet")


@pytest.mark.slow
@pytest.mark.parametrize(("make", "images"), [(deit_tiny, 1000), (deit_small, 576), (deit_base, 147)])
def test_a_large_network_sees_fewer_images_on_a_cpu(make, images):
    recipe = make()
    with torch.device("meta"):
        model = build_network(recipe.model, 1000)
    loaded = Loaded(model, None, None, "model", "class", recipe, None)
    assert affordable(loaded, torch.device("cpu")) == images
    assert affordable(loaded, torch.device("cuda")) == 1000


@pytest.mark.slow
def test_networks_without_a_second_token(reported, tiny):
    """A plain DeiT has one token, a convnet none."""

    def looked_at(recipe):
        loaded = load(reported.run.output)._replace(model=build_network(recipe.model, 4).eval(), recipe=recipe)
        return look_at_tokens(loaded, torch.zeros(2, 3, 32, 32), ["a", "b"])

    assert looked_at(tiny(convnet_teacher)) == (Missing("a resnet10t has no tokens"),) * 2
    cosine, maps = looked_at(tiny(model={"distilled": False}))
    assert cosine == Missing("the network has no distillation token")
    assert [len(row) for row in maps] == [2, 2]


@pytest.mark.slow
def test_a_run_that_holds_images_out_is_judged_by_them(tiny, data):
    recipe = tiny(data={"val": None, "hold_out": 0.25}, run={"epochs": 1})
    scores = train(recipe)
    with world("cpu") as joined:
        judged = look(read_run(recipe.run.output), joined, images=100, batch=16).judged
    train_set = open_dataset(data / "train.beton", "data.train")
    assert judged.index.tolist() == divide(recipe.data, train_set.label).held_out.tolist()
    train_set.close()
    assert judged.of == 40
    head = headline_head(scores["ema"], None)
    assert judged.top1 == pytest.approx(scores["ema"][head]["top1"])
