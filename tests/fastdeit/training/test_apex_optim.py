"""apex's FusedAdam behind the recipe's switch, with PyTorch's AdamW as judge and a stand-in of apex's signature."""

import copy
import sys
import types

import pytest
import torch
from timm.optim import Lamb

from fastdeit.pipelines.errors import UserError
from fastdeit.recipes import RECIPES
from fastdeit.training import apex_optim
from fastdeit.training.optim import build_optimizer, load_optimizer, optimizer_state, set_lr
from refusals import refused
from runs import changed


class FusedAdam(torch.optim.Optimizer):
    """The signature and the state of apex's, and the update of Loshchilov and Hutter (arXiv 1711.05101)."""

    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0,
        amsgrad=False, set_grad_none=True, capturable=False, master_weights=False,
    ):  # fmt: skip
        assert adam_w_mode
        lr = torch.tensor(lr) if capturable else lr
        super().__init__(
            params,
            {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay},
        )

    def zero_grad(self):
        super().zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if "step" in group:
                group["step"] += 1
            else:
                group["step"] = torch.tensor([1], dtype=torch.int) if torch.is_tensor(group["lr"]) else 1
            count, (b1, b2) = int(group["step"]), group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
                state["exp_avg_sq"].mul_(b2).add_(p.grad.square(), alpha=1 - b2)
                update = state["exp_avg"] / (1 - b1**count)
                update = update / ((state["exp_avg_sq"] / (1 - b2**count)).sqrt() + group["eps"])
                p.sub_((update + group["weight_decay"] * p) * group["lr"])


class FusedLAMB(Lamb):
    """The signature and the state of apex's; timm's LAMB is a port of it."""

    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, amsgrad=False,
        adam_w_mode=True, grad_averaging=True, set_grad_none=True, max_grad_norm=1.0, use_nvlamb=False,
    ):  # fmt: skip
        assert adam_w_mode
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = torch.tensor(float(group.get("step", 0)))
        super().step()
        for group in self.param_groups:
            group["step"] = int(group["step"])


@pytest.fixture
def apex(monkeypatch):
    package, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    optimizers.FusedAdam, optimizers.FusedLAMB = FusedAdam, FusedLAMB
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    monkeypatch.setattr(apex_optim, "DEVICE", "cpu")


def recipe(implementation):
    return changed(RECIPES["deit_tiny"](), optim={"implementation": implementation}).resolved()


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3))


def train(model, optimizer, steps):
    for number in steps:
        optimizer.zero_grad()
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
        model(inputs).square().sum().backward()
        set_lr(optimizer, 1e-2 / (1 + number))
        optimizer.step()


def test_the_update_is_adamws(apex):
    ours, judge = network(), network()
    optimizer = build_optimizer(ours, recipe("apex"))
    assert apex_optim.is_apex(optimizer)
    train(ours, optimizer, range(6))
    decayed = [p for p in judge.parameters() if p.ndim > 1]
    plain = [p for p in judge.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    train(judge, torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8), range(6))
    for a, b in zip(ours.parameters(), judge.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("way", [("torch", "apex"), ("apex", "torch"), ("apex", "apex")])
def test_a_run_goes_on_with_the_other(apex, monkeypatch, way, capturable):
    if capturable:
        plain = apex_optim.build_apex
        monkeypatch.setattr("fastdeit.training.optim.build_apex", lambda *args, **_: plain(*args, capturable=True))
    straight = network()
    train(straight, build_optimizer(straight, recipe("torch")), range(8))

    model = network()
    optimizer = build_optimizer(model, recipe(way[0]))
    train(model, optimizer, range(4))
    stored = copy.deepcopy(optimizer_state(optimizer))
    optimizer = build_optimizer(model, recipe(way[1]))
    rate = optimizer.param_groups[0]["lr"]
    load_optimizer(optimizer, stored)
    assert optimizer.param_groups[0]["lr"] is rate or not torch.is_tensor(rate)
    train(model, optimizer, range(4, 8))
    for a, b in zip(model.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("way", [("torch", "apex"), ("apex", "torch"), ("apex", "apex"), ("torch", "torch")])
def test_a_run_with_lamb_goes_on_with_the_other(apex, way):
    lamb = {"name": "lamb", "betas": None, "eps": None}
    first, second = (changed(recipe(implementation), optim=lamb) for implementation in way)
    straight, model = network(), network()
    train(straight, build_optimizer(straight, first), range(8))
    optimizer = build_optimizer(model, first)
    assert apex_optim.is_apex(optimizer) == (way[0] == "apex")
    train(model, optimizer, range(4))
    stored = copy.deepcopy(optimizer_state(optimizer))
    assert all(group["step"].item() == 4.0 for group in stored["param_groups"])
    optimizer = build_optimizer(model, second)
    load_optimizer(optimizer, stored)
    train(model, optimizer, range(4, 8))
    for a, b in zip(model.parameters(), straight.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_stored_is_what_adamw_stores(apex):
    model = network()
    optimizer = build_optimizer(model, recipe("apex"))
    train(model, optimizer, range(3))
    stored = optimizer_state(optimizer)
    judge = torch.optim.AdamW([{"params": list(g["params"])} for g in optimizer.param_groups])
    judge.load_state_dict(stored)
    for value in judge.state.values():
        assert value["step"] == 3
        assert set(value) == {"step", "exp_avg", "exp_avg_sq"}
    assert all(type(group["lr"]) is float and "step" not in group for group in stored["param_groups"])


def test_uneven_steps_do_not_go_into_apex(apex):
    model = network()
    optimizer = build_optimizer(model, recipe("torch"))
    train(model, optimizer, range(2))
    stored = copy.deepcopy(optimizer_state(optimizer))
    stored["state"][0]["step"] += 5
    refused(r"took 2 to 7 steps.*implementation torch", load_optimizer, build_optimizer(model, recipe("apex")), stored)


def test_a_changed_weight_decay_is_taken_on_resuming():
    model = network()
    optimizer = build_optimizer(model, recipe("torch"))
    train(model, optimizer, range(2))
    again = build_optimizer(model, changed(recipe("torch"), optim={"weight_decay": 0.3}))
    load_optimizer(again, optimizer_state(optimizer))
    assert [group["weight_decay"] for group in again.param_groups] == [0.3, 0.0]


def test_without_apex_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(apex_optim.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match=r"not installed: build it from https://github.com/NVIDIA/apex .*torch"):
        build_optimizer(network(), recipe("apex"))


def test_pypis_apex_is_told_apart(monkeypatch, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.setitem(sys.modules, "apex", None)  # so that what is imported here goes again
    monkeypatch.delitem(sys.modules, "apex")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path}.* is not NVIDIA's.*PyPI's apex is another project"):
        build_optimizer(network(), recipe("apex"))
    monkeypatch.delitem(sys.modules, "apex", raising=False)


def test_a_cpu_is_refused(apex, monkeypatch):
    monkeypatch.setattr(apex_optim, "DEVICE", "cuda")
    refused("runs on a GPU, but the weights are on cpu", build_optimizer, network(), recipe("apex"))


def test_sgd_has_no_implementation_but_its_own():
    made = recipe("apex")
    with pytest.raises(UserError, match="leave it at 'torch'"):
        changed(made, optim={"name": "sgd"}).resolved()
