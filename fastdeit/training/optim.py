"""Optimizer groups, learning-rate schedule and the average of the weights (paper, Table 9)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastdeit.config import Recipe
from fastdeit.sections import OptimConfig
from fastdeit.training.apex_optim import build_apex, is_apex, to_apex, to_torch
from fastdeit.training.timm_optim import build_timm_optimizer

_TOKENS = ("cls_token", "pos_embed")


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_dist_token: bool = False, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Two groups: weights with decay, and parameters without: 1-d ones, biases, position embedding, tokens.

    `decay_dist_token` follows the released code: timm 0.3.2 exempted only pos_embed and cls_token. With a `layer_decay`
    other than 1, a DeiT has two groups for each layer, as timm counts them: the embedding, the blocks (the last one
    with the final norm), the heads. `lr_scale` multiplies a group's learning rate (Clark et al. 2020, "ELECTRA").
    """
    exempt = _TOKENS if decay_dist_token else (*_TOKENS, "dist_token")
    layered = layer_decay != 1
    last = len([*model.get_submodule("blocks").children()]) + 1 if layered else 0
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {
        (i, without): [] for i in range(last + 1) for without in (False, True)
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        without = parameter.ndim <= 1 or name.endswith(".bias") or name.rpartition(".")[2] in exempt
        groups[_layer(name, last) if layered else 0, without].append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if without else weight_decay,
            **({"lr_scale": layer_decay ** (last - layer)} if layered else {}),
        }
        for (layer, without), parameters in groups.items()
    ]


def _layer(name: str, last: int) -> int:
    """The layer of a DeiT's parameter: 0 the embedding, then the blocks, `last` the heads."""
    first, _, rest = name.partition(".")
    if first == "blocks":
        return 1 + int(rest.partition(".")[0])
    if first in (*_TOKENS, "dist_token", "patch_embed"):
        return 0
    return last - 1 if first == "norm" else last


def build_optimizer(model: nn.Module, recipe: Recipe, *, scaled: bool = False) -> torch.optim.Optimizer:
    """The recipe's optimizer over `parameter_groups`; AdamW and SGD are fused if the parameters are on a GPU.

    On a GPU, AdamW's learning rate is a tensor that `set_lr` overwrites, so a CUDA graph reads the current value.
    `scaled` means that a GradScaler takes the step. Raises UserError for an implementation that is not installed, and
    for a name that neither PyTorch nor timm has.
    """
    cfg = recipe.filled().optim
    decay_dist_token = bool(recipe.departures.decay_dist_token)
    groups = parameter_groups(model, cfg.weight_decay, decay_dist_token=decay_dist_token, layer_decay=cfg.layer_decay)
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    if cfg.name == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.momentum > 0, fused=cuda)
    if cfg.implementation == "apex":
        # A capturable FusedAdam needs an older scaler than PyTorch's present one.
        return build_apex(groups, cfg, capturable=cuda and not scaled)
    if cfg.name != "adamw":
        peak = peak_lr(cfg, recipe.run.global_batch)
        return build_timm_optimizer(groups, cfg, peak)
    options: dict[str, Any] = {"betas": cfg.betas, "eps": cfg.eps}
    if cuda:
        return torch.optim.AdamW(_with_tensors(groups, cfg.lr), lr=cfg.lr, fused=True, capturable=True, **options)
    # On a CPU only the foreach form gives the same bits on any number of threads.
    return torch.optim.AdamW(groups, lr=cfg.lr, foreach=True, **options)


def _with_tensors(groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
    """The groups with their learning rates as tensors on the device; groups of one scale share a tensor."""
    device = groups[0]["params"][0].device
    rates = {scale: torch.tensor(lr * scale, device=device) for scale in {1.0, *map(_scale, groups)}}
    return [{**group, "lr": rates[_scale(group)]} for group in groups]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups, without waiting for a device that holds it."""
    held: dict[int, tuple[torch.Tensor, float]] = {}
    for group in optimizer.param_groups:
        rate = lr * _scale(group)
        if isinstance(group["lr"], torch.Tensor):
            held[id(group["lr"])] = group["lr"], rate  # groups of one scale share a tensor
        else:
            group["lr"] = rate
    for tensor, rate in held.values():
        tensor.fill_(rate)


def _scale(group: dict[str, Any]) -> float:
    return group.get("lr_scale", 1.0)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state in PyTorch's form, for checkpoints, whichever implementation runs."""
    state = optimizer.state_dict()
    if is_apex(optimizer):
        state = to_torch(state, optimizer)
    return {**state, "param_groups": [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the moments and step counts that `optimizer_state` returned, from this implementation or another.

    Everything else in the groups follows the recipe, since a checkpoint may come from another device, or the recipe may
    have changed. Raises UserError for a state that apex's FusedAdam cannot hold, ValueError for one of other
    parameters.
    """
    kept = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    if is_apex(optimizer):
        first = optimizer.param_groups[0]
        capturable = isinstance(first["lr"], torch.Tensor)
        state = to_apex(state, optimizer, capturable=capturable, device=first["params"][0].device)
    # Some optimizers count their steps in the group, which has no such entry before the first step.
    kept = [
        {**{name: theirs[name] for name in ("step",) if name in theirs}, **mine}
        for mine, theirs in zip(kept, state["param_groups"], strict=True)
    ]
    groups = [{**mine, "params": saved["params"]} for mine, saved in zip(kept, state["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    for group, mine in zip(optimizer.param_groups, kept, strict=True):
        group.update(mine)  # keeps the tensors that a graph reads


def peak_lr(cfg: OptimConfig, global_batch: int) -> float:
    """The learning rate after warm-up: scaled linearly with the batch (paper: 5e-4 x batch / 512)."""
    return cfg.lr * global_batch / cfg.lr_batch if cfg.lr_batch else cfg.lr


def learning_rate(recipe: Recipe, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step: linear warm-up, then a cosine to `min_lr` at the end of the last epoch.

    With `optim.warmup_prefix` the cosine starts when warm-up ends. Otherwise it starts at epoch 0, and warm-up replaces
    its first epochs. With a curriculum, time is measured in compute: see `Curriculum.elapsed`.

    With `optim.schedule` "wsd" (warm-up, stable, decay) it stays at its peak until the last `decay_epochs`, over which
    it falls linearly to `min_lr` (Haegele et al., arXiv 2405.18392).

    With `departures.schedule_unit` "epoch" it moves once an epoch, and `schedule_lag` epochs late: the released
    code's loop runs epochs 0 and 1 at the first value (deit issue 145).
    """
    cfg, departures = recipe.optim, recipe.departures
    if departures.schedule_unit == "epoch":
        time = float(max(0, epoch - (departures.schedule_lag or 0)))
    else:
        time = max(0.0, epoch + step / steps_per_epoch - (departures.schedule_lag or 0))
    time = recipe.parts().elapsed(time)
    top = peak_lr(cfg, recipe.run.global_batch)
    if time < cfg.warmup_epochs:
        return cfg.warmup_lr + (top - cfg.warmup_lr) * time / cfg.warmup_epochs
    if cfg.schedule == "wsd":
        left = recipe.run.epochs - time
        return top if left >= cfg.decay_epochs else cfg.min_lr + (top - cfg.min_lr) * left / cfg.decay_epochs
    begin = cfg.warmup_epochs if cfg.warmup_prefix else 0.0
    angle = math.pi * (time - begin) / (recipe.run.epochs - begin)
    return cfg.min_lr + 0.5 * (top - cfg.min_lr) * (1 + math.cos(angle))


class Ema:
    """Exponential moving average of a model's parameters and floating-point buffers.

    `shadow` is a full state dict, in the model's names; integer buffers are copied. The tensors of model and average
    are collected once: load other weights into them in place.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        state = {name: value.detach() for name, value in model.state_dict().items()}
        self.shadow = {name: value.clone() for name, value in state.items()}
        averaged = [name for name, value in state.items() if value.is_floating_point()]
        copied = [name for name in state if name not in set(averaged)]
        self._averaged = [self.shadow[name] for name in averaged], [state[name] for name in averaged]
        self._copied = [self.shadow[name] for name in copied], [state[name] for name in copied]

    @torch.no_grad()
    def update(self) -> None:
        """shadow = decay * shadow + (1 - decay) * model."""
        torch._foreach_lerp_(*self._averaged, 1.0 - self.decay)
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)

    def load(self, state: dict[str, torch.Tensor]) -> None:
        for name, value in self.shadow.items():
            value.copy_(state[name])


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None) -> None:
    """Scale the gradients to a norm of at most `limit`; None leaves them (paper: no clipping)."""
    if limit is not None:
        torch.nn.utils.clip_grad_norm_(parameters, limit)
