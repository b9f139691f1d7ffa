"""Optimizer groups, schedule and average, with timm and the paper's figures as judges."""

import math

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV2

from fastdeit.recipes import RECIPES, deit_tiny_finetune
from fastdeit.sections import OptimConfig
from fastdeit.training.optim import (
    Ema,
    build_optimizer,
    learning_rate,
    load_optimizer,
    optimizer_state,
    parameter_groups,
    peak_lr,
    set_lr,
)
from fastdeit.training.timm_optim import check_name, why_slow
from refusals import refused
from runs import assert_same_state, changed, newest, rewind, train, trained


@pytest.fixture(scope="module")
def network():
    return timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=10, depth=2)


def names(model, group):
    by_id = {id(p): n for n, p in model.named_parameters()}
    return {by_id[id(p)] for p in group["params"]}


def test_groups_are_timms(network):
    ours = parameter_groups(network, 0.05)
    without, with_decay = param_groups_weight_decay(network, 0.05, no_weight_decay_list=network.no_weight_decay())
    assert names(network, ours[0]) == names(network, with_decay)
    assert names(network, ours[1]) == names(network, without)
    assert (ours[0]["weight_decay"], ours[1]["weight_decay"]) == (0.05, 0.0)


@pytest.mark.parametrize("distilled", [False, True])
def test_learning_rates_of_the_layers_are_timms(distilled):
    model = timm.create_model(f"deit_tiny{'_distilled' * distilled}_patch16_224", img_size=32, num_classes=10, depth=3)
    theirs = {}
    for group in param_groups_layer_decay(
        model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.75, min_scale=0.0
    ):
        theirs |= dict.fromkeys(names(model, group), (group["lr_scale"], group["weight_decay"]))
    optimizer = build_optimizer(model, deit_tiny_finetune().filled())
    set_lr(optimizer, 0.5)
    ours = {}
    for group in optimizer.param_groups:
        ours |= dict.fromkeys(names(model, group), (group["lr"] / 0.5, group["weight_decay"]))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == pytest.approx(theirs[name]), name
    assert len({rate for rate, _ in ours.values()}) == 5


def test_the_released_code_decays_the_distillation_token(network):
    paper = names(network, parameter_groups(network, 0.05)[1])
    released = names(network, parameter_groups(network, 0.05, decay_dist_token=True)[1])
    assert paper - released == {"dist_token"}


def test_peak_follows_the_batch():
    assert peak_lr(OptimConfig(), 1024) == 1e-3
    assert peak_lr(OptimConfig(lr=5e-6, lr_batch=0), 1024) == 5e-6


def timm_schedule(recipe, updates):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=peak_lr(recipe.optim, recipe.run.global_batch))
    return CosineLRScheduler(
        optimizer,
        t_initial=recipe.run.epochs * updates,
        lr_min=recipe.optim.min_lr,
        warmup_t=int(recipe.optim.warmup_epochs * updates),
        warmup_lr_init=recipe.optim.warmup_lr,
    )


def test_schedule_per_step_is_timms():
    recipe = RECIPES["deit_small"]().resolved()
    steps = 50
    scheduler = timm_schedule(recipe, steps)
    for epoch in (0, 1, 4, 5, 6, 150, 299):
        for step in (0, 17, 49):
            expected = scheduler._get_lr(epoch * steps + step)[0]
            assert learning_rate(recipe, epoch, step, steps) == pytest.approx(expected, rel=1e-9)


def test_released_schedule_is_timms_stepped_an_epoch_late():
    recipe = changed(RECIPES["deit_small"](), compat="released").resolved()
    scheduler = timm_schedule(recipe, 1)
    rates = [learning_rate(recipe, e, s, 10) for e in range(300) for s in (0, 9)]
    assert rates[0] == rates[2] == recipe.optim.warmup_lr  # epochs 0 and 1
    for epoch in range(1, 300):
        # Its loop calls scheduler.step(epoch) after the epoch, so epoch e runs with what t = e - 1 gave.
        assert rates[2 * epoch] == rates[2 * epoch + 1] == pytest.approx(scheduler._get_lr(epoch - 1)[0], rel=1e-9)


def test_ends_of_the_schedule():
    recipe = RECIPES["deit_base"]().resolved()
    assert learning_rate(recipe, 0, 0, 1251) == 1e-6
    assert learning_rate(recipe, 5, 0, 1251) == pytest.approx(
        1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * 5 / 300))
    )
    assert learning_rate(recipe, 299, 1250, 1251) == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.slow
def test_average_is_timms():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3)
    ours, theirs = Ema(model, 0.9), ModelEmaV2(model, decay=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        ours.update()
        theirs.update(model)
    # timm averages integer buffers too; a count is copied here.
    for name, value in theirs.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(ours.shadow[name], value, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(ours.shadow[name], model.state_dict()[name])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimizer_takes_the_recipe(network, name):
    optimizer = build_optimizer(network, changed(RECIPES["deit_tiny"](), optim={"name": name}).resolved())
    assert type(optimizer).__name__.lower() == name
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.05, 0.0]
    if name == "adamw":
        assert optimizer.defaults["betas"] == (0.9, 0.999)
        assert optimizer.defaults["eps"] == 1e-8


TIMM = [name for name in list_optimizers() if not name.startswith(("bnb", "fused", "adahessian", "kron"))]


def stepped(model, optimizer, steps):
    for number in steps:
        inputs = torch.randn(5, 8, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        set_lr(optimizer, 1e-3 * (number + 1))
        optimizer.step()


@pytest.mark.parametrize("name", TIMM)
def test_timms_optimizers_resume_to_the_same_bits(tmp_path, name):
    """Each of them: its state goes through a file, and its update equals that of timm's own factory."""
    recipe = changed(RECIPES["deit_tiny"](), optim=OptimConfig(name=name, lr=1e-3, lr_batch=0)).resolved()

    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))

    straight, judge, model = network(), network(), network()
    stepped(straight, build_optimizer(straight, recipe), range(4))
    theirs = create_optimizer_v2(judge, opt=name, lr=1e-3, weight_decay=0.05, momentum=0.9)
    stepped(judge, theirs, range(4))
    for mine, other in zip(straight.parameters(), judge.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
    optimizer = build_optimizer(model, recipe)
    stepped(model, optimizer, range(2))
    torch.save(optimizer_state(optimizer), tmp_path / "state.pt")
    again = build_optimizer(model, recipe)
    load_optimizer(again, torch.load(tmp_path / "state.pt", weights_only=True))
    stepped(model, again, range(2, 4))
    for mine, other in zip(model.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "lamp"}, "'lamp' is neither adamw, sgd nor an optimizer of timm, such as lamb"),
        ({"name": "fusedlamb"}, "set --optim.name lamb --optim.implementation apex"),
        ({"name": "bnblion"}, "needs another package"),
        ({"name": "adahessian"}, "needs second derivatives"),
        ({"name": "AdamW"}, "is written in lower case: --optim.name adamw"),
        ({"name": "lamb", "momentum": 0.8}, r"optim\.momentum has no effect: lamb takes none"),
        ({"name": "kron"}, "draws random numbers that no checkpoint holds"),
        ({"name": "lion", "eps": 1e-6}, r"optim\.eps has no effect: lion takes none"),
        ({"name": "adan", "betas": (0.9, 0.99)}, r"optim\.betas has no effect: adan does not take two betas"),
    ],
)
def test_what_timms_optimizers_do_not_take_is_refused(fields, message):
    refused(message, check_name, OptimConfig(**fields))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lamb", "muon"])
def test_a_run_with_an_optimizer_of_timm_resumes_to_the_same_bits(tiny, tmp_path, name):
    """LAMB counts its steps in the groups, Muon marks each parameter's kind."""
    recipe = tiny(optim={"name": name}, run={"checkpoint_every": 5, "keep_checkpoints": 9, "output": tmp_path / "run"})
    straight = trained(recipe)
    rewind(recipe, 15)
    assert_same_state(straight, trained(recipe))
    other = changed(recipe, run={"resume_changed": True}, optim={"name": "adan"})
    refused(rf"trained with optim\.name {name}, but this run has adan, which keeps another state", train, other)


def wsd(**fields):
    return changed(RECIPES["deit_tiny"](), optim={"schedule": "wsd", **fields}, run={"epochs": 20}).resolved()


def test_a_lamb_that_launches_tensor_by_tensor_is_named(monkeypatch):
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer, gpu = create_optimizer_v2([weight], "lamb"), torch.device("cuda")
    optimizer.defaults["foreach"] = None  # as timm has it from 1.0.31 on
    assert why_slow(optimizer, gpu) is None
    del optimizer.defaults["foreach"]
    monkeypatch.setattr(timm, "__version__", "1.0.29")
    assert "timm 1.0.29 launches LAMB's update tensor by tensor" in (why_slow(optimizer, gpu) or "")
    assert why_slow(optimizer, torch.device("cpu")) is None
    assert why_slow(create_optimizer_v2([weight], "lion"), gpu) is None


def test_warm_up_stable_decay_is_pytorchs():
    """Chained from PyTorch's own schedulers, stepped once a batch."""
    recipe, steps = wsd(warmup_epochs=2.0, decay_epochs=5.0), 10
    top = peak_lr(recipe.optim, recipe.run.global_batch)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=top)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, recipe.optim.warmup_lr / top, 1.0, total_iters=2 * steps)
    flat = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, total_iters=1)
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, recipe.optim.min_lr / top, total_iters=5 * steps)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, flat, fall], [2 * steps, 15 * steps])
    for number in range(20 * steps):
        ours = learning_rate(recipe, *divmod(number, steps), steps)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6), number
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("decay_epochs", "reason"),
    [
        (-1.0, "-1: .* from 0 to 18, the epochs after warm-up"),
        (18.5, r"18\.5: .* from 0 to 18, the epochs after warm-up"),
        (float("nan"), "nan: it must be a finite number"),
    ],
)
def test_a_decay_longer_than_the_run_is_refused(decay_epochs, reason):
    refused(rf"optim\.decay_epochs is {reason}", wsd, warmup_epochs=2.0, decay_epochs=decay_epochs)


@pytest.mark.slow
def test_fine_tuning_with_layers_of_their_own_rates_resumes_to_the_same_bits(tiny, tmp_path, capsys):
    """With a batch that no mixing group of the paper divides."""
    before = tiny(model={"distilled": False}, run={"epochs": 1, "output": tmp_path / "before"})
    train(before)
    recipe = tiny(
        deit_tiny_finetune,
        model={"init": newest(before), "drop_path": 0.1},
        data={"repeats": 1},
        optim={"layer_decay": 0.5},
        departures={"mix_group": 1},
        run={"global_batch": 10, "checkpoint_every": 5, "keep_checkpoints": 9, "output": tmp_path / "after"},
    )
    straight = trained(recipe)
    assert "each layer's 0.5 times the next layer's" in capsys.readouterr().out
    assert len(straight["optimizer"]["param_groups"]) == 2 * 4
    assert {group["lr_scale"] for group in straight["optimizer"]["param_groups"]} == {1, 0.5, 0.25, 0.125}
    rewind(recipe, 15)
    assert_same_state(straight, trained(recipe))
    refused(r"optim\.layer_decay", train, changed(recipe, optim={"layer_decay": 0.75}))
    other = changed(recipe, run={"resume_changed": True}, optim={"layer_decay": 1.0})
    refused(r"trained with optim\.layer_decay 0\.5, but this run has 1\.0, so the optimizer's", train, other)


@pytest.mark.gpu
def test_on_a_gpu_the_layers_rates_are_tensors_that_a_graph_reads(device):
    """Groups of one scale share a tensor, also after a new rate and a loaded state; the step matches the CPU's."""
    recipe, weights = deit_tiny_finetune().filled(), []
    for place in (device, torch.device("cpu")):
        torch.manual_seed(0)
        model = timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=10, depth=2).to(place)
        optimizer = build_optimizer(model, recipe)
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(place)
        before = [group["lr"] for group in optimizer.param_groups]
        for rate in (0.1, 0.02):
            set_lr(optimizer, rate)
            optimizer.step()
        load_optimizer(optimizer, optimizer_state(optimizer))
        if place.type == "cuda":
            assert all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, before, strict=True))
            assert len({id(tensor) for tensor in before}) == 4
        for group in optimizer.param_groups:
            assert float(group["lr"]) == pytest.approx(0.02 * group["lr_scale"])
        weights.append([parameter.detach().cpu() for parameter in model.parameters()])
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
