"""A recipe's network and loss in anyone's loop, beside timm's and PyTorch's own."""

import pytest
import timm
import torch
import torch.nn.functional as F

import fastdeit
from fastdeit.pipelines.errors import UserError
from fastdeit.recipes import RECIPES
from refusals import refused
from runs import changed


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("deit_tiny", "deit_tiny_patch16_224"),
        ("deit_tiny_distilled", "deit_tiny_distilled_patch16_224"),
        ("deit_small_distilled_384", "deit_small_distilled_patch16_224"),
        ("deit3_small", "deit3_small_patch16_224"),
    ],
)
def test_the_network_is_timms(recipe, name):
    ours = fastdeit.create_model(recipe, num_classes=7, img_size=32)
    theirs = timm.create_model(name, num_classes=7, img_size=32)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in ours.blocks]
    cfg = RECIPES[recipe]().model
    assert max(rates) == pytest.approx(cfg.drop_path)
    assert (min(rates) == max(rates)) == cfg.drop_path_uniform
    assert isinstance(ours.train()(images), tuple) == ("distilled" in recipe)


def test_mistakes_in_a_network_are_named():
    with pytest.raises(UserError, match="img_size 33 is not a multiple of the recipe's patches of 16 pixels"):
        fastdeit.create_model("deit_tiny", img_size=33)
    refused(r"trains a resnet18: timm.create_model\('resnet18'\) makes it", fastdeit.create_model, "convnet_teacher")
    distilled = changed(RECIPES["deit3_small"](), model={"distilled": True})
    refused("no network with a distillation token without a position", fastdeit.create_model, distilled)
    refused("there is no recipe 'deit_huge'", fastdeit.create_model, "deit_huge")


def test_the_loss_of_one_head_is_cross_entropy():
    logits, labels = torch.randn(6, 5), torch.randint(5, (6,))
    loss = fastdeit.objective("deit_tiny")
    torch.testing.assert_close(loss(logits, labels), F.cross_entropy(logits, labels))
    soft = torch.softmax(torch.randn(6, 5), 1)
    torch.testing.assert_close(loss(logits, soft), F.cross_entropy(logits, soft))


@pytest.mark.parametrize("teacher", ["logits", "labels"])
def test_hard_distillation_takes_the_teachers_decision(teacher):
    heads, labels, taught = (torch.randn(6, 5), torch.randn(6, 5)), torch.randint(5, (6,)), torch.randn(6, 5)
    given = taught if teacher == "logits" else taught.argmax(1)
    wanted = (F.cross_entropy(heads[0], labels) + F.cross_entropy(heads[1], taught.argmax(1))) / 2
    torch.testing.assert_close(fastdeit.objective("deit_tiny_distilled")(heads, labels, given), wanted)


def test_soft_distillation_is_the_papers():
    soft = {"distillation": "soft", "alpha": 0.3, "tau": 2.0}
    recipe = changed(RECIPES["deit_tiny_distilled"](), objective=soft)
    heads, labels, taught = (torch.randn(6, 5), torch.randn(6, 5)), torch.randint(5, (6,)), torch.randn(6, 5)
    divergence = F.kl_div(
        F.log_softmax(heads[1] / 2, 1), F.log_softmax(taught / 2, 1), reduction="batchmean", log_target=True
    )
    wanted = 0.7 * F.cross_entropy(heads[0], labels) + 0.3 * 4 * divergence
    torch.testing.assert_close(fastdeit.objective(recipe)(heads, labels, taught), wanted)


def test_inputs_that_do_not_fit_the_recipe_are_refused():
    loss = fastdeit.objective("deit_tiny_distilled")
    with pytest.raises(ValueError, match="no teacher output was given"):
        loss((torch.randn(2, 5), torch.randn(2, 5)), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="for a student with distillation token"):
        loss(torch.randn(2, 5), torch.zeros(2, dtype=torch.int64), torch.randn(2, 5))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"trian": "x"}}, "the section 'data' of a recipe has no field 'trian'"),
        ({"dat": {}}, "a recipe has no section 'dat': model, data, augment"),
        ({"run": {"epochs": 0}}, "run.epochs is 0"),
        ({"run": {"epochs": "10"}}, "a value of the wrong type"),
        ({"run": 5}, "the section 'run' of a recipe is 5: give a dict"),
        ({"name": {"x": 1}}, "a recipe has no section 'name'"),
    ],
)
def test_mistakes_in_a_run_are_named(sections, message):
    refused(message, fastdeit.Trainer, "deit_tiny", **sections)
