"""DeiT III's recipes: a step against timm's network, mixing and optimizer and the authors' loss, in float64."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.optim import Lamb, param_groups_weight_decay

from fastdeit.distributed import World
from fastdeit.pipelines.plan.drop_path import draw_drop_path, drop_path_rates
from fastdeit.recipes import RECIPES
from fastdeit.training.optim import learning_rate
from runs import assert_same_state, changed, rewind, trained
from steps import CLASSES, build, synthetic

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
BATCH, STEPS = 32, 3
NAMES = [name for name in RECIPES if name.startswith("deit3_")]


def shrunk(name, **run):
    recipe = RECIPES[name]()
    model = {**SMALL, "kernels": "torch", "finetune": False}
    run = {"global_batch": BATCH, "device": "cpu", **run}
    return changed(recipe, model=model, run=run, departures={"mix_group": BATCH})


class Scale(torch.nn.Module):
    def forward(self, x):
        return x * self.factors[:, None, None]


def authors_loss(recipe, logits, targets):
    """`main.py` and `engine.py` of the authors: BCEWithLogitsLoss of the targets above 0, else timm's."""
    if recipe.objective.loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, targets.gt(0.0).type(targets.dtype))
    return SoftTargetCrossEntropy()(logits, targets)


def judged(recipe, state, batches):
    """timm's weights after the steps, and the losses."""
    model = timm.create_model("deit3_small_patch16_224", num_classes=CLASSES, **SMALL).double()
    model.load_state_dict(state, strict=True)
    cfg = recipe.optim
    groups = param_groups_weight_decay(model, cfg.weight_decay, no_weight_decay_list=model.no_weight_decay())
    optimizer = {"lamb": Lamb, "adamw": torch.optim.AdamW}[cfg.name](groups, lr=cfg.lr, eps=1e-8)
    paths = [Scale() for _ in range(2 * SMALL["depth"])]
    for block, (attention, mlp) in zip(model.blocks, zip(paths[::2], paths[1::2], strict=True), strict=True):
        block.drop_path1, block.drop_path2 = attention, mlp
    rates, losses = drop_path_rates(SMALL["depth"], recipe.model.drop_path, uniform=True), []
    for number, batch in enumerate(batches):
        masks = torch.from_numpy(draw_drop_path(recipe.run.seed, number, np.arange(BATCH), rates)).double()
        for path, factors in zip(paths, masks.flatten(0, 1), strict=True):
            path.factors = factors
        data, smoothing = batch.data, recipe.augment.label_smoothing
        # timm mixes a batch with itself reversed; here the partner's label is given.
        sides = [mixup_target(label, CLASSES, 1.0, smoothing) for label in (data.label_a, data.label_b)]
        targets = data.lam[:, None] * sides[0] + (1 - data.lam[:, None]) * sides[1]
        loss = authors_loss(recipe, model(data.images.double()), targets.double())
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, 0, number, 100)
        optimizer.step()
        losses.append(loss.item())
    return model.state_dict(), losses


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_steps_equal_timms_network_and_optimizer_with_the_authors_loss(name):
    recipe = changed(shrunk(name), optim={"warmup_epochs": 0.0}).filled()
    training = build(recipe, World(0, 1, 1, torch.device("cpu")))
    start = {key: value.clone() for key, value in training.model.state_dict().items()}
    make = synthetic(recipe, torch.device("cpu"), BATCH)
    batches = [make(number) for number in range(STEPS)]
    losses = [float(training(batch, 0, number, number).loss) for number, batch in enumerate(batches)]
    state, expected = judged(recipe, {key: value.double() for key, value in start.items()}, batches)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for key, value in training.model.state_dict().items():
        moved = (state[key] - start[key].double()).abs().max()
        assert (value.double() - state[key]).abs().max() <= 2e-3 * moved + 4e-7, key  # 4e-7: float32 near 1
        assert moved > 0, key


@pytest.mark.slow
@pytest.mark.parametrize("other", [False, True])
def test_a_run_resumes_to_the_same_bits(tiny, tmp_path, other):
    """The other: with gradient checkpointing, and with a distillation token that learns from nobody."""
    recipe = tiny(
        RECIPES["deit3_large"],
        model={"distilled": other, "grad_checkpointing": other},
        run={"checkpoint_every": 5, "keep_checkpoints": 9, "output": tmp_path / "run"},
    )
    straight = trained(recipe)
    assert "blocks.0.ls1.gamma" in straight["model"]
    rewind(recipe, 15)
    assert_same_state(straight, trained(recipe))
