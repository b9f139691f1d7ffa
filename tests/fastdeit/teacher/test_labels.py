"""Labels stored beforehand: training with them is training with the teacher, to the bit."""

import json
import pickle
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo

from fastdeit import checkpoint
from fastdeit.data import TrainingData
from fastdeit.distributed import world
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.errors import UserError
from fastdeit.teacher import teacher
from fastdeit.teacher.label_cache import Described, LabelCache, LabelWriter, pixel_key
from fastdeit.teacher.labelling import label_run
from fastdeit.teacher.teacher import Teacher
from forked import run_module, run_module_twice, succeed
from hostile import vouch
from refusals import refused
from runs import changed, opened, same_values, trained

FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture
def distilled(tiny, teacher_checkpoint, tmp_path):
    """Function: a small recipe that distils, with a place for the teacher's labels."""

    def make(kind="hard", **sections):
        teacher = {"name": "resnet10t", "checkpoint": teacher_checkpoint, "labels": tmp_path / "labels"}
        return tiny(objective={"distillation": kind}, teacher=teacher, **sections)

    return make


def label(recipe, **options):
    with world("cpu") as joined:
        label_run(recipe, joined, **{"first_epoch": 0, "end_epoch": recipe.run.epochs, "topk": 4, **options})


@pytest.fixture(scope="module")
def stored(tiny_in, teacher_checkpoint, tmp_path_factory):
    """A folder of hard labels of two epochs."""
    folder = tmp_path_factory.mktemp("stored")
    teacher = {"name": "resnet10t", "checkpoint": teacher_checkpoint, "labels": folder / "labels"}
    label(tiny_in(folder / "run", objective={"distillation": "hard"}, teacher=teacher))
    return folder / "labels"


@pytest.fixture
def labelled(distilled, stored):
    """`distilled()`, and a copy of its labels of two epochs."""
    recipe = distilled()
    shutil.copytree(stored, recipe.teacher.labels)
    return recipe


def weights(recipe):
    """Weights after a run of `recipe`."""
    return trained(recipe)["model"]


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [0, 12])
def test_a_run_with_labels_is_the_run_with_the_teacher(distilled, tmp_path, micro_batch):
    recipe = distilled(run={"micro_batch": micro_batch})
    live = weights(changed(recipe, teacher={"labels": None}, run={"output": tmp_path / "live"}))
    label(recipe)
    assert same_values(weights(changed(recipe, teacher={"checkpoint": None})), live)


@pytest.mark.slow
def test_the_teacher_is_compiled_where_training_compiles_it(distilled, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    stored = []
    for compile in ("off", "on"):
        recipe = distilled(run={"compile": compile})
        recipe = changed(recipe, teacher={"labels": tmp_path / compile})
        torch._dynamo.utils.counters.clear()
        label(recipe)
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1) == (compile == "on")
        stored.append({path.name: path.read_bytes() for path in (tmp_path / compile).glob("*.npy")})
    assert stored[0]
    assert stored[0] == stored[1]


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_round_trip_on_fashion_mnist(distilled, teacher_checkpoint, tmp_path):
    """The teacher is that of another data set, whose labels are no worse for that."""
    convert(str(FASHION / "train-images-idx3-ubyte.gz"), tmp_path / "fm.beton", limit=256, progress=False)
    state = checkpoint.load(teacher_checkpoint)
    state["class_names"], state["num_classes"] = [str(i) for i in range(10)], 10
    head = torch.randn(10, state["model"]["fc.weight"].shape[1], generator=torch.Generator().manual_seed(1))
    state["model"]["fc.weight"], state["model"]["fc.bias"] = head, torch.zeros(10)
    torch.save(state, tmp_path / "teacher.pt")
    recipe = distilled(data={"train": tmp_path / "fm.beton", "val": None}, run={"epochs": 1})
    recipe = changed(recipe, teacher={"checkpoint": tmp_path / "teacher.pt"})
    label(recipe)
    live = weights(changed(recipe, teacher={"labels": None}, run={"output": tmp_path / "live"}))
    assert same_values(weights(changed(recipe, teacher={"checkpoint": None})), live)


@pytest.mark.slow
def test_labels_are_what_the_teacher_says_of_each_sample(labelled):
    recipe = labelled
    cache = LabelCache(recipe.teacher.labels)
    teacher = Teacher(recipe.teacher, recipe.augment.mean, recipe.augment.std, 32, 4)
    with opened(TrainingData, recipe) as data, data.batches() as batches:
        for step in range(data.steps):
            item = next(batches)
            expected = teacher.network(teacher.prepare(item.data.images)).argmax(1)
            assert torch.equal(cache.labels(0, step * 32 + item.position), expected)


@pytest.mark.slow
@pytest.mark.parametrize("topk", [2, 4])
def test_soft_labels_keep_the_largest_logits(distilled, topk):
    recipe = distilled("soft")
    label(recipe, end_epoch=1, topk=topk)
    cache = LabelCache(recipe.teacher.labels)
    teacher = Teacher(recipe.teacher, recipe.augment.mean, recipe.augment.std, 32, 4)
    with opened(TrainingData, recipe) as data, data.batches() as batches:
        item = next(batches)
    said = teacher.logits(item.data.images)
    stored = cache.logits(0, item.position)
    kept = said >= said.sort(1, descending=True).values[:, topk - 1 : topk]
    torch.testing.assert_close(stored[kept], said[kept], rtol=1e-3, atol=1e-3)
    assert torch.all(stored.softmax(1)[~kept] == 0)
    refused(f"holds soft labels \\(topk {topk}", label, recipe, topk=topk - 1)
    with pytest.raises(UserError, match="holds soft labels of 4 classes, but the run distils hard"):
        weights(changed(recipe, objective={"distillation": "hard"}))


@pytest.mark.slow
def test_two_processes_label_what_one_does(distilled, tmp_path):
    recipe = distilled()
    label(recipe)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(changed(recipe, teacher={"labels": tmp_path / "two"}).to_dict()))
    words = [recipe.name, "--config", str(file)]
    out, _ = succeed(run_module_twice, "fastdeit.commands.label", words)
    assert "hard labels of 2 more epochs" in out
    for epoch in range(2):
        one, two = (np.load(folder / f"epoch-{epoch:04d}.npy") for folder in (tmp_path / "labels", tmp_path / "two"))
        np.testing.assert_array_equal(one, two)
    assert "already holds 2 of these epochs" in succeed(run_module, "fastdeit.commands.label", words)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        ("run", {"seed": 1}, "run.seed is 0 there and 1 here"),
        ("augment", {"crop_scale": (0.5, 1.0)}, "augment.crop_scale is"),
        ("augment", {"crop": "simple"}, "augment.crop is"),
        ("data", {"repeats": 1}, "data.repeats is 3 there and 1 here"),
        ("run", {"global_batch": 16}, "run.global_batch is 32 there and 16 here"),
        ("departures", {"mix_group": 16}, "mixing group size is 8 there and 16 here"),
    ],
)
def test_labels_of_other_pixels_are_refused_by_field(labelled, section, values, named):
    other = changed(labelled, **{section: values})
    for use in (weights, label):
        refused(named, use, other)


@pytest.mark.slow
def test_what_reaches_no_pixel_may_differ(distilled):
    recipe = distilled(run={"epochs": 1})
    label(recipe)
    weights(changed(recipe, augment={"label_smoothing": 0.0}, optim={"lr": 1e-4}))


@pytest.mark.slow
def test_data_of_other_content_are_refused(labelled, images, tmp_path):
    convert(str(images / "train"), tmp_path / "other.beton", shuffle_seed=1, progress=False)
    refused(r"data.train \(content\) is", weights, changed(labelled, data={"train": tmp_path / "other.beton"}))


@pytest.mark.slow
def test_another_teacher_is_refused(labelled, teacher_checkpoint, tmp_path):
    state = checkpoint.load(teacher_checkpoint)
    state["model"]["fc.bias"] += 1
    torch.save(state, tmp_path / "other.pt")
    refused("another teacher made them", label, changed(labelled, teacher={"checkpoint": tmp_path / "other.pt"}))


@pytest.mark.slow
def test_missing_epochs_are_named(distilled):
    recipe = distilled()
    label(recipe, end_epoch=1)
    refused("no labels for 1 of the run's epochs, the first of them 1", weights, recipe)


@pytest.fixture
def described():
    """Function: what labels of 9 classes say of themselves."""

    def describe(seed=0):
        return Described({"run.seed": seed}, "0" * 64, "resnet10t", class_names=None, num_classes=9, topk=0)

    return describe


def test_writers_at_a_time_keep_one_anothers_epochs(described, tmp_path):
    written = np.random.default_rng(0).integers(0, 9, (24, 50))

    def write(first):
        writer = LabelWriter(tmp_path, described())
        for epoch in range(first, 24, 6):
            writer.write(epoch, written[epoch])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(6)))
    cache = LabelCache(tmp_path)
    cache.check_epochs(0, 24)
    for epoch in range(24):
        np.testing.assert_array_equal(cache.labels(epoch, np.arange(50)), written[epoch])


def test_an_epoch_that_another_process_stored_stays(described, tmp_path):
    for label, writer in enumerate([LabelWriter(tmp_path, described()) for _ in range(2)]):
        writer.write(0, np.full(5, label))
    assert LabelCache(tmp_path).labels(0, np.arange(5)).tolist() == [0] * 5


def test_a_writer_of_other_pixels_is_refused_however_late(described, tmp_path):
    writers = [LabelWriter(tmp_path, described(seed)) for seed in range(2)]
    writers[0].write(0, np.zeros(5))
    refused(r"run\.seed is 0 there and 1 here", writers[1].write, 1, np.zeros(5))


@pytest.mark.slow
def test_what_goes_to_the_hardware_decoder_is_named_where_it_reaches_pixels(distilled):
    recipe, key = distilled(), {}
    with opened(TrainingData, recipe) as data:
        for pixels in ("pillow", "nvjpeg"):
            data.loader.pixels = pixels
            shares = [changed(recipe, data={"hw_decoder_load": load}) for load in (0.65, 0.0)]
            key[pixels] = [pixel_key(share, data) for share in shares]
    assert key["pillow"][0] == key["pillow"][1]
    differing = [name for name, value in key["nvjpeg"][0].items() if key["nvjpeg"][1][name] != value]
    assert differing == ["data.hw_decoder_load"]


@pytest.mark.slow
def test_mistakes_of_the_recipe(distilled, tiny):
    refused("does not distil", label, tiny())
    refused(r"give --teacher\.labels", label, changed(distilled(), teacher={"labels": None}))
    refused("the data set has 4 classes", label, distilled("soft"), topk=5)
    refused("make them with fastdeit-label", weights, distilled())


class Evil:
    def __reduce__(self):
        return print, ("never",)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip", "pickle", "classes", "short", "gone", "index", "entry", "key"])
def test_damaged_labels_are_named(labelled, damage, capsys):
    folder = labelled.teacher.labels
    file, index = folder / "epoch-0000.npy", folder / "labels.json"
    described = json.loads(index.read_text())
    if damage == "index":
        index.write_text(index.read_text()[:-200])
    elif damage == "entry":
        index.write_text(json.dumps({**described, "epochs": {"0": "x"}}))
    elif damage == "key":
        index.write_text(json.dumps({**described, "key": 7}))
    elif damage == "gone":
        file.unlink()
    elif damage == "flip":
        data = bytearray(file.read_bytes())
        data[-3] ^= 4
        file.write_bytes(data)
    else:
        if damage == "pickle":
            file.write_bytes(pickle.dumps(Evil()))
        else:
            np.save(file, np.full(16 if damage == "short" else 200, 9 if damage == "classes" else 1, np.uint16))
        vouch(file)
    refused(r"labels", weights, labelled)
    assert "never" not in capsys.readouterr().out


@pytest.mark.slow
def test_soft_labels_that_unpack_to_much_more_are_refused(tmp_path):
    """A file of 130 kB that would take 134 MB; what Python allocates is measured."""
    writer = LabelWriter(tmp_path, Described({}, "0" * 64, "resnet10t", class_names=None, num_classes=9, topk=2))
    writer.write(0, np.zeros((8, 2), np.uint16), np.ones((8, 2), np.float16))
    assert LabelCache(tmp_path).logits(0, np.arange(8)).shape == (8, 9)
    file = tmp_path / "epoch-0000.npz"
    np.savez_compressed(file, index=np.zeros((1 << 24, 2), np.uint16), logits=np.zeros((1 << 24, 2), np.float16))
    assert file.stat().st_size < 1 << 18
    vouch(file)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"epoch-0000\.npz: not soft labels \(its index is compressed"):
        LabelCache(tmp_path).logits(0, np.arange(8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip", "gone"])
def test_labels_are_made_again_as_the_error_says(labelled, damage):
    recipe = labelled
    file = recipe.teacher.labels / "epoch-0001.npy"
    before = file.read_bytes()
    if damage == "flip":
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        said = "it was changed after it was written: remove it and make it again with fastdeit-label"
    else:
        file.unlink()
        said = r"no labels for 1 of the run's epochs, the first of them 1 .*: run fastdeit-label with the same recipe"
    refused(said, weights, recipe)
    file.unlink(missing_ok=True)
    label(recipe)
    assert file.read_bytes() == before
