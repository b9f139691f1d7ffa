"""What `throughput` compares: the same inference and training step on our model and on timm's.

A training step is what the trainer does between two batches: stochastic depth, forward pass, soft-target
cross-entropy (and the hard distillation loss where there is a distillation token), backward pass, AdamW, and the
average of the weights where it is asked for. Both sides have the same parameter groups, and fused AdamW on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from fastdeit.config import Recipe
from fastdeit.drop_path import draw_drop_path
from fastdeit.model import DeiT, build_model
from fastdeit.objective import build_objective
from fastdeit.optim import Ema, build_optimizer, parameter_groups
from fastdeit.precision import Precision

CLASSES = 1000
Step = Callable[[], int]
State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison. `recipe` is resolved; it gives model, optimizer and objective."""

    recipe: Recipe
    mode: Literal["train", "infer"]
    batch: int
    ema: bool
    precision: Precision

    @property
    def device(self) -> torch.device:
        return self.precision.device

    def describe(self) -> dict[str, Any]:
        """What tells this case from another, as JSON takes it."""
        return {
            "model": self.recipe.name.removesuffix("_384"),
            "img_size": self.recipe.model.img_size,
            "mode": self.mode,
            "batch": self.batch,
            "ema": self.ema,
            "precision": self.precision.name,
            "device": self.device.type,
        }


@dataclass(frozen=True)
class Inputs:
    """A random batch on the device.

    images   (B, 3, S, S) float32
    targets  (B, K) float32, rows summing to 1
    labels   (B,) int64: what a teacher would say
    """

    images: Tensor
    targets: Tensor
    labels: Tensor

    @classmethod
    def draw(cls, case: Case, batch: int) -> Inputs:
        size, device = case.recipe.model.img_size, case.device
        return cls(
            torch.randn(batch, 3, size, size, device=device),
            torch.randn(batch, CLASSES, device=device).softmax(-1),
            torch.randint(CLASSES, (batch,), device=device),
        )


def our_model(case: Case) -> DeiT:
    return build_model(case.recipe.model, CLASSES).to(case.device)


def timm_model(case: Case, *, both_heads: bool, drop_path: float) -> nn.Module:
    """timm's model of the same shape. In training mode with `both_heads` it returns both heads' logits."""
    cfg = case.recipe.model
    name = f"{case.recipe.name.removesuffix('_384')}_patch16_224"  # the 384 forms differ in img_size alone
    model: Any = timm.create_model(name, num_classes=CLASSES, img_size=cfg.img_size, drop_path_rate=drop_path)
    if cfg.distilled and both_heads:
        model.set_distilled_training(True)
    return model.to(case.device)


def make_step(case: Case, who: str, state: State, inputs: Inputs, *, compiled: bool) -> Step:
    """A step of `who` ("fastdeit" or "timm") that starts from the weights `state`; it returns its images."""
    ours = who == "fastdeit"
    drop_path = case.recipe.model.drop_path if case.mode == "train" else 0.0
    model: Any = our_model(case) if ours else timm_model(case, both_heads=case.mode == "train", drop_path=drop_path)
    model.load_state_dict(state)
    model.train(case.mode == "train")
    called: Any = torch.compile(model, dynamic=False) if compiled else model
    if case.mode == "infer":
        return _infer_step(called, case, inputs)
    return (_our_train_step if ours else _timm_train_step)(model, called, case, inputs)


def _infer_step(called: Any, case: Case, inputs: Inputs) -> Step:
    @torch.inference_mode()
    def step() -> int:
        with case.precision.autocast():
            called(inputs.images)
        return case.batch

    return step


def _our_train_step(model: DeiT, called: Any, case: Case, inputs: Inputs) -> Step:
    cfg = case.recipe.model
    objective = build_objective(case.recipe.objective, cfg.distilled, case.recipe.departures)
    optimizer = build_optimizer(model, case.recipe)
    ema = Ema(model, case.recipe.ema.decay) if case.ema else None
    positions = np.arange(case.batch)
    labels = inputs.labels if cfg.distilled else None
    number = 0

    def step() -> int:
        nonlocal number
        masks = torch.from_numpy(draw_drop_path(0, number, positions, cfg.depth, cfg.drop_path))
        model.set_drop_path(masks.to(case.device, non_blocking=True))
        number += 1
        optimizer.zero_grad(set_to_none=True)
        with case.precision.autocast():
            loss = objective(called(inputs.images), inputs.targets, labels).loss
        loss.backward()
        optimizer.step()
        if ema is not None:
            ema.update(model)
        return case.batch

    return step


def _timm_train_step(model: nn.Module, called: Any, case: Case, inputs: Inputs) -> Step:
    cfg = case.recipe.optim
    groups = parameter_groups(model, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=case.device.type == "cuda")
    ema = ModelEmaV3(model, decay=case.recipe.ema.decay) if case.ema else None
    soft, hard = SoftTargetCrossEntropy(), nn.CrossEntropyLoss()

    def step() -> int:
        optimizer.zero_grad(set_to_none=True)
        with case.precision.autocast():
            output = called(inputs.images)
            if case.recipe.model.distilled:
                loss = (soft(output[0], inputs.targets) + hard(output[1], inputs.labels)) / 2
            else:
                loss = soft(output, inputs.targets)
        loss.backward()
        optimizer.step()
        if ema is not None:
            ema.update(model)
        return case.batch

    return step


def disagreement(case: Case, ours: DeiT) -> str | None:
    """Why ours must not be compared with timm, or None where both compute the same thing.

    With the weights of `ours`, logits and gradients of two images must agree in float32 to 1e-4 and 1e-3 of the
    largest value of a tensor. In the precision that is timed, our logits may be no further from timm's in float32
    than twice what timm's own are. Both run without stochastic depth. Compiled forms are not looked at: they are
    PyTorch's own transformation of these.
    """
    peer = timm_model(case, both_heads=True, drop_path=0.0).train()
    peer.load_state_dict(ours.state_dict())
    inputs = Inputs.draw(case, batch=2)
    exact = Precision("fp32", None, case.device)
    logits, gradients = _outcome(peer, case, inputs, exact)
    our_logits, our_gradients = _outcome(ours, case, inputs, exact)
    if our_logits.keys() != logits.keys() or our_gradients.keys() != gradients.keys():
        return "they differ in their heads or in which parameters have gradients"
    for what, found, wanted, limit in (
        ("logits", our_logits, logits, 1e-4),
        ("gradients", our_gradients, gradients, 1e-3),
    ):
        name, distance = _worst(found, wanted)
        if not distance <= limit:
            return f"{what} of {name} differ by {distance:.1e} of the largest in fp32, which is more than {limit:.0e}"
    if case.precision.dtype is not None:
        theirs = _worst(_outcome(peer, case, inputs, case.precision)[0], logits)[1]
        name, distance = _worst(_outcome(ours, case, inputs, case.precision)[0], logits)
        if not distance <= 2 * theirs:
            return f"logits of {name} lose {distance:.1e} in {case.precision.name}, where timm's lose {theirs:.1e}"
    return None


def _outcome(model: Any, case: Case, inputs: Inputs, precision: Precision) -> tuple[State, State]:
    """Logits by head, and gradients by parameter."""
    model.zero_grad(set_to_none=True)
    with precision.autocast():
        output = model(inputs.images)
    heads = output if isinstance(output, tuple) else (output, None)
    logits = {name: head for name, head in zip(("cls", "dist"), heads, strict=True) if head is not None}
    loss = SoftTargetCrossEntropy()(logits["cls"].float(), inputs.targets)
    if "dist" in logits:
        loss = loss + nn.functional.cross_entropy(logits["dist"].float(), inputs.labels)
    loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {name: head.detach() for name, head in logits.items()}, gradients


def _worst(found: State, wanted: State) -> tuple[str, float]:
    distances = {
        name: float((found[name].float() - value.float()).abs().max() / value.float().abs().max())
        for name, value in wanted.items()
    }
    # A NaN is worse than any number, and max() would pass over it.
    return max(distances.items(), key=lambda item: float("inf") if item[1] != item[1] else item[1])
