"""Curriculum runs, checked against timm (model, schedule), single-size runs (batches) and resumed runs (bits)."""

import copy

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.scheduler import CosineLRScheduler

import fastdeit
from fastdeit.cli import parse_recipe
from fastdeit.data import TrainingData
from fastdeit.distributed import World
from fastdeit.inputs import open_dataset
from fastdeit.model.deit import build_model
from fastdeit.model.fused import fuse
from fastdeit.recipes import RECIPES, deit_small
from fastdeit.sections import ModelConfig
from fastdeit.teacher import teacher
from fastdeit.teacher.label_cache import pixel_key
from fastdeit.training import step
from fastdeit.training.optim import learning_rate
from refusals import refused
from runs import assert_same_state, changed, evaluated, final_state, newest, opened, rewind, train, trained
from steps import Tape, replay_with

GROWING = {"curriculum": {"sizes": (16, 24, 32), "magnitudes": (0.0, 4.0, 9.0)}}
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def growing_model(**fields):
    torch.manual_seed(0)
    model = build_model(ModelConfig(**SHAPE, drop_path=0.0, **fields), 7)
    model.accept_sizes([16, 24, 32])
    return model


@pytest.mark.parametrize("no_embed_class", [False, True])
@pytest.mark.parametrize("size", [16, 24, 40])
def test_images_of_another_size_are_computed_as_by_timm(no_embed_class, size):
    ours = growing_model(no_embed_class=no_embed_class)
    ours.accept_sizes([40])
    judge = timm.create_model(
        "deit_tiny_patch16_224", num_classes=7, dynamic_img_size=True, no_embed_class=no_embed_class, **SHAPE
    )
    judge.load_state_dict(ours.state_dict(), strict=True)
    images, weights = torch.randn(3, 3, size, size), torch.randn(3, 7)
    for model in (ours, judge):
        out = model(images)
        ((out if model is judge else out.cls) * weights).sum().backward()
    torch.testing.assert_close(ours(images).cls, judge(images), rtol=1e-4, atol=1e-5)
    for (name, one), other in zip(ours.named_parameters(), judge.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text)


def test_the_position_embedding_is_resized_as_by_timm_with_two_tokens():
    ours = growing_model(distilled=True)
    found = ours._positions(torch.zeros(1, 3, 24, 24))
    expected = resample_abs_pos_embed(ours.pos_embed, [3, 3], num_prefix_tokens=2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_other_sizes_are_refused():
    model = growing_model()
    for shape in ((1, 3, 40, 40), (1, 3, 16, 64), (1, 5, 192)):
        with pytest.raises(ValueError, match="the model takes 32 x 32 pixels, and the sizes that"):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="20 pixels: that is not a multiple of the patch size 8"):
        model.accept_sizes([20])


@pytest.mark.parametrize("distilled", [False, True])
def test_the_kernels_take_images_of_each_size(device, distilled):
    plain = growing_model(distilled=distilled).to(device)
    plain.accept_sizes([16, 24, 32])
    fused = copy.deepcopy(plain)
    assert "tokens" in fuse(fused).replaced
    for size in (16, 24, 32):
        images = torch.randn(2, 3, size, size, device=device)
        for model in (plain, fused):
            model.zero_grad()
            out = model(images)
            sum(logits.square().sum() for logits in out if logits is not None).backward()
        for (name, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(
                other.grad, one.grad, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text
            )


def test_the_batches_are_those_of_runs_of_one_size(tiny):
    recipe = tiny(**GROWING, run={"epochs": 8})
    assert recipe.parts().starts == [0, 5, 7, 8]
    with opened(TrainingData, recipe) as data:
        for epoch, size, magnitude in ((0, 16, 0), (4, 16, 0), (5, 24, 4), (7, 32, 9), (1, 16, 0)):
            single = tiny(model={"img_size": size}, augment={"randaugment": f"rand-m{magnitude}-mstd0.5-inc1"})
            with opened(TrainingData, single) as judge:
                for (*_, ours), (*_, theirs) in zip(data.flow(epoch), judge.flow(epoch), strict=True):
                    assert ours.images.shape[2:] == (size, size)
                    assert torch.equal(ours.images, theirs.images)


def test_two_processes_make_the_batches_of_one(tiny):
    recipe = tiny(**GROWING, run={"epochs": 8})
    dataset = open_dataset(recipe.data.train)
    shares = [TrainingData(recipe, dataset, World(rank, 2, 2, torch.device("cpu"))) for rank in range(2)]
    with opened(TrainingData, recipe) as whole:
        for epoch in (4, 5, 7):
            batches = zip(whole.flow(epoch), *(share.flow(epoch) for share in shares), strict=True)
            for (_, _, one), (_, _, first), (_, _, second) in batches:
                assert torch.equal(one.images, torch.cat([first.images, second.images]))
    for share in shares:
        share.close()


def test_create_loader_grows_too(data):
    shape = {"img_size": 32, "patch_size": 8}
    recipe = changed(deit_small(), model=shape, data={"loader": "torch"}, run={"epochs": 8}, **GROWING)
    with fastdeit.create_loader(data / "train.beton", recipe, batch_size=32, device="cpu", epoch=4) as loader:
        sides = [{images.shape[-1] for images, _ in loader} for _ in range(6)]
    assert sides == [{16}, {24}, {24}, {32}, {32}, {32}]  # after the run's epochs, the last part goes on
    model = fastdeit.create_model(recipe, num_classes=4)
    for epoch in (4, 5, 7):
        with fastdeit.create_loader(data / "train.beton", recipe, batch_size=32, device="cpu", epoch=epoch) as loader:
            assert model(next(iter(loader))[0]).shape == (32, 4)
    with fastdeit.create_loader(data / "train.beton", recipe, batch_size=32, device="cpu", img_size=48) as loader:
        assert next(iter(loader))[0].shape == (32, 3, 48, 48)


@pytest.mark.slow
def test_resumed_in_each_part_and_at_each_border_it_ends_with_the_same_bits(tiny, events):
    sections = {**GROWING, "model": {"drop_path": 0.2}, "optim": {"warmup_epochs": 1.6, "warmup_prefix": True}}
    run = {"epochs": 8, "checkpoint_every": 3, "eval_every": 4, "keep_checkpoints": 100}
    recipe = tiny(**sections, run=run)
    expected = trained(recipe)
    lines = events(recipe.run.output, "train")
    assert [round(line["lr"], 9) for line in lines] == [
        round(learning_rate(recipe, line["epoch"], line["step"], 5), 9) for line in lines
    ]
    for at in (12, 25, 27, 35, 36, 39):  # the parts begin with steps 25 and 35
        rewind(recipe, at)
        assert_same_state(expected, trained(recipe))


@pytest.mark.slow
def test_a_run_does_not_resume_without_its_curriculum(tiny):
    train(tiny(curriculum={"sizes": (16, 24, 32)}, run={"epochs": 9}))
    refused(r"curriculum\.sizes = .*, this run has \[\]", train, tiny(run={"epochs": 9}))


def test_a_recipes_curriculum_can_be_switched_off():
    parts = parse_recipe(["deit_tiny_curriculum", "--curriculum.sizes", "--curriculum.magnitudes"]).parts()
    assert (parts.count, parts.plain) == (1, True)


def test_replayed_steps_are_recorded_again_for_each_size(tiny, monkeypatch):
    sections = {**GROWING, "model": {"drop_path": 0.2}}
    run = {"epochs": 8, "eval_every": 8}
    eager = trained(tiny(**sections, run={**run, "output": tiny().run.output / "eager"}))
    tapes = []
    replay_with(lambda device: tapes.append(Tape()) or tapes[-1], monkeypatch.setattr)
    assert_same_state(eager["model"], trained(tiny(**sections, run=run))["model"])
    assert [(tape.ran, tape.recorded, tape.replayed) for tape in tapes] == [(3, 1, 22), (3, 1, 7), (3, 1, 2)]
    assert [tape.discarded for tape in tapes] == [1, 1, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["off", "on"])
def test_on_a_gpu_the_graph_of_each_size_has_the_bits_of_the_steps(tiny, compile):
    found = []
    for graphs in ("off", "on"):
        torch._dynamo.reset()
        run = {"epochs": 8, "eval_every": 8, "device": "cuda", "cuda_graphs": graphs, "compile": compile}
        output = tiny().run.output / graphs
        recipe = tiny(**GROWING, model={"drop_path": 0.2, "kernels": "triton"}, run={**run, "output": output})
        found.append(trained(recipe)["model"])
    assert_same_state(*found)


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(tiny, taught, monkeypatch):
    for module in (step, teacher):
        monkeypatch.setattr(module, "COMPILER", "aot_eager")
    found = []
    for compiled in ("off", "on"):
        torch._dynamo.reset()
        run = {"epochs": 8, "compile": compiled, "eval_every": 8, "output": tiny().run.output / compiled}
        found.append(trained(tiny(**taught, **GROWING, model={"distilled": True}, run=run))["model"])
    assert_same_state(*found)


@pytest.mark.slow
def test_stored_labels_are_those_of_the_teacher_in_the_loop(tiny, taught, tmp_path):
    from fastdeit.teacher.labelling import label_run

    sections = {**taught, **GROWING, "model": {"distilled": True}}
    folder = tmp_path / "labels"
    with_labels = {**sections, "teacher": {**taught["teacher"], "labels": folder}}
    recipe = tiny(**with_labels, run={"epochs": 8, "eval_every": 8})
    with fastdeit.distributed.world("cpu") as joined:
        label_run(recipe, joined, first_epoch=0, end_epoch=8, topk=0, sets=None)
    stored = trained(recipe)["model"]
    beside = tmp_path / "beside"
    assert_same_state(stored, trained(tiny(**sections, run={"epochs": 8, "eval_every": 8, "output": beside}))["model"])
    longer = tiny(**with_labels, run={"epochs": 9, "eval_every": 9, "output": tmp_path / "longer"})
    refused("run.epochs", train, longer)


def test_the_checkpoint_is_of_the_models_size_and_the_log_tells_the_parts(tiny, capsys):
    recipe = tiny(**GROWING, run={"epochs": 8, "eval_every": 4})
    scores = train(recipe)
    assert scores["model"]["images"] == 44
    said = capsys.readouterr().out
    assert "images of 16 pixels in 5 epochs, 24 pixels in 2 epochs, 32 pixels in 1 epoch;" in said
    assert "RandAugment of magnitude 0, 4, 9" in said
    assert fastdeit.load(newest(recipe)).recipe.model.img_size == 32
    assert final_state(recipe)["model"]["pos_embed"].shape == (1, 18, 48)
    assert evaluated(newest(recipe))["model"]["class"]["top1"] == scores["model"]["class"]["top1"]
    assert evaluated(newest(recipe), img_size=48)["model"]["images"] == 44


def test_warm_up_before_the_cosine_is_timms_and_follows_the_computation():
    recipe = RECIPES["deit_small_curriculum"]().resolved()
    cfg, parts = recipe.optim, recipe.parts()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.lr)
    judge = CosineLRScheduler(
        optimizer,
        t_initial=4690 - 938,
        lr_min=cfg.min_lr,
        warmup_t=938,
        warmup_lr_init=cfg.warmup_lr,
        warmup_prefix=True,
    )
    for part in range(10):  # each is a tenth of the computation, and so of the schedule
        expected = judge._get_lr(469 * part)[0]
        assert learning_rate(recipe, parts.starts[part], 0, 312) == pytest.approx(expected, rel=1e-9)


def test_labels_of_other_pixels_are_not_taken(tiny):
    """One magnitude for the whole run changes the pixels; sizes that are all the model's do not."""
    run = {"epochs": 8}
    cases = {"none": {}, "one": {"magnitudes": (0.0,)}, "same": {"sizes": (32, 32)}, "growing": GROWING["curriculum"]}
    keys, pixels = {}, {}
    for name, curriculum in cases.items():
        recipe = tiny(curriculum=curriculum, run=run)
        with opened(TrainingData, recipe) as data:
            keys[name] = pixel_key(recipe, data)
            pixels[name] = next(data.flow(0))[-1].images.clone()
    for name in cases:
        same = pixels[name].shape == pixels["none"].shape and torch.equal(pixels[name], pixels["none"])
        assert (keys[name] == keys["none"]) == same == (name in ("none", "same"))
    plain = tiny(curriculum={"magnitudes": (0.0,)}, augment={"policy": "plain"}).parts()
    assert plain.sentence() is None


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"curriculum": {"sizes": (20, 32)}}, "curriculum.sizes has 20, not a multiple of model.patch_size 8"),
        (
            {"model": {"arch": "resnet10t", "distilled": False}, "curriculum": {"sizes": (16, 32)}},
            "curriculum.sizes need model.arch 'deit', not 'resnet10t'",
        ),
        ({**GROWING, "run": {"epochs": 2}}, "run.epochs 2 is too short for the 3 parts of the curriculum"),
    ],
)
def test_recipes_that_cannot_grow_are_refused(tiny, sections, reason):
    refused(reason, tiny, **{"run": {"epochs": 9}, **sections})
