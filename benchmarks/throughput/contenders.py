"""The contenders of `throughput`: the same inference and training step on our model and on timm's.

Our training step is the trainer's own, `fastdeit.training.step`, in the forms that a recipe can choose. timm's does the
same work: stochastic depth, forward pass, soft-target cross-entropy (and the hard distillation loss with a distillation
token) or DeiT III's binary cross-entropy, backward pass, AdamW or timm's LAMB, and the average of the weights if
requested. Both use the same parameter groups, and fused AdamW on a GPU. timm's model also gets what ours has (its step
as one CUDA graph, recorded in the same way) and what could make it faster: each mode of torch.compile, and each fast
backend of PyTorch's attention.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from benchmarks.throughput.forms import Form, ModelCase
from fastdeit.data import TrainBatch
from fastdeit.model.attention_backend import BACKENDS
from fastdeit.model.kernel_choice import TORCH, Kernels, choose_kernels
from fastdeit.model.networks import build_network
from fastdeit.pipelines.batch import Batch
from fastdeit.precision import Precision
from fastdeit.training.graphs import CudaRecorder, Recorder, Replayed
from fastdeit.training.optim import parameter_groups
from fastdeit.training.step import TrainingStep
from fastdeit.training.timm_optim import build_timm_optimizer

CLASSES = 1000
Step = Callable[[], int]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Inputs:
    """A random batch on the device, and a teacher's labels (B,) int64."""

    data: Batch
    labels: Tensor
    smoothing: float

    @classmethod
    def draw(cls, case: ModelCase, batch: int) -> Inputs:
        size, device = case.recipe.model.img_size, case.device
        data = Batch(
            images=torch.randn(batch, 3, size, size, device=device),
            label_a=torch.randint(CLASSES, (batch,), device=device),
            label_b=torch.randint(CLASSES, (batch,), device=device),
            lam=torch.rand(batch, device=device),
            index=torch.arange(batch, device=device),
        )
        return cls(data, torch.randint(CLASSES, (batch,), device=device), case.recipe.augment.label_smoothing)

    def targets(self) -> Tensor:
        """(B, K) float32, rows summing to 1."""
        return self.data.targets(CLASSES, self.smoothing)


@dataclass(frozen=True)
class _StoredLabels:
    """A teacher's stored labels: a `LabelCache` of one batch."""

    hard: Tensor

    def labels(self, epoch: int, entries: np.ndarray) -> Tensor:
        return self.hard

    def logits(self, epoch: int, entries: np.ndarray) -> Tensor:
        raise NotImplementedError("the benchmark distils hard labels")


def our_kernels(case: ModelCase, form: Form) -> Kernels:
    """The kernels of a form, as the recipe chooses. Raises UserError if it chooses "triton" and none can run."""
    if not form.kernels:
        return TORCH
    return choose_kernels(case.recipe.model, case.precision, CLASSES, case.world)


def our_model(case: ModelCase, form: Form) -> Any:
    cfg = dataclasses.replace(case.recipe.model, drop_path_mode="skip" if form.skip else "mask")
    return build_network(cfg, CLASSES, our_kernels(case, form)).to(case.device)


def timm_model(case: ModelCase, *, both_heads: bool, drop_path: float) -> nn.Module:
    """timm's model of the same shape. In training mode with `both_heads` it returns both heads' logits."""
    cfg = case.recipe.model
    # The 384 forms differ in img_size alone.
    name = f"{case.recipe.name.removesuffix('_384')}_patch{cfg.patch_size}_224"
    shape: Any = {"img_size": cfg.img_size, "depth": cfg.depth}
    model: Any = timm.create_model(name, num_classes=CLASSES, drop_path_rate=drop_path, **shape)
    if cfg.distilled and both_heads:
        model.set_distilled_training(True)
    return model.to(case.device)


def make_step(case: ModelCase, form: Form, state: State, inputs: Inputs) -> Step:
    """A step of that form, starting from the weights `state`; it returns its number of images.

    Raises UserError if the form is not available here.
    """
    drop_path = case.recipe.model.drop_path if case.mode == "train" else 0.0
    model: Any = (
        our_model(case, form)
        if form.library == "fastdeit"
        else timm_model(case, both_heads=case.mode == "train", drop_path=drop_path)
    )
    model.load_state_dict(state)
    model.train(case.mode == "train")
    if form.library == "fastdeit" and case.mode == "train":
        return _our_train_step(model, case, form, inputs)
    called: Any = _WithSdpa(model, form.sdpa) if form.sdpa else model
    if form.compiled:
        called = torch.compile(called, dynamic=False, mode=form.mode)
    if case.mode == "infer":
        return _infer_step(called, case, inputs)
    return _timm_train_step(model, called, case, inputs, graph=form.graph)


class _WithSdpa(nn.Module):
    """A model whose attention uses one backend of `scaled_dot_product_attention`.

    The choice is in the forward pass, so that torch.compile sees it: what it compiled for one backend does not serve
    another. Where the backend cannot compute the shapes, the forward pass raises RuntimeError.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = model
        self.backend = BACKENDS[name]

    def forward(self, images: Tensor) -> Any:
        with sdpa_kernel(self.backend):
            return self.model(images)


def _infer_step(called: Any, case: ModelCase, inputs: Inputs) -> Step:
    @torch.inference_mode()
    def step() -> int:
        with case.precision.autocast():
            called(inputs.data.images)
        return case.batch

    return step


def _our_train_step(model: Any, case: ModelCase, form: Form, inputs: Inputs) -> Step:
    recipe, replace = case.recipe, dataclasses.replace
    # A constant learning rate, as in timm's step.
    optim = replace(
        recipe.optim,
        implementation="apex" if form.apex else "torch",
        lr_batch=0,
        warmup_epochs=0,
        min_lr=recipe.optim.lr,
    )
    run = replace(
        recipe.run,
        global_batch=case.batch,
        compile="on" if form.compiled else "off",
        cuda_graphs="on" if form.graph else "off",
    )
    kind = "hard" if recipe.model.distilled else "none"
    objective = replace(recipe.objective, distillation=kind)
    recipe = replace(
        recipe,
        model=replace(recipe.model, drop_path_mode="skip" if form.skip else "mask"),
        optim=optim,
        run=run,
        objective=objective,
        ema=replace(recipe.ema, enabled=case.ema),
    ).resolved()
    training = TrainingStep(
        recipe,
        case.world,
        case.precision,
        model,
        our_kernels(case, form),
        num_classes=CLASSES,
        steps_per_epoch=1,
        labels=_StoredLabels(inputs.labels) if recipe.model.distilled else None,
    )
    batch = TrainBatch(inputs.data, np.arange(case.batch), np.zeros(case.batch, np.int32), [], [])
    number = 0

    def step() -> int:
        nonlocal number
        training(batch, 0, 0, number)
        number += 1
        return case.batch

    return step


def _timm_train_step(
    model: nn.Module, called: Any, case: ModelCase, inputs: Inputs, *, graph: bool, recorder: Recorder | None = None
) -> Step:
    """`graph`: replay the step as one CUDA graph, recorded as ours is; `recorder` None: on the case's device."""
    cfg, cuda = case.recipe.filled().optim, case.device.type == "cuda"
    groups = parameter_groups(model, cfg.weight_decay)
    options: dict[str, Any] = {"betas": cfg.betas, "eps": cfg.eps, "capturable": graph and cuda}
    adamw = cfg.name == "adamw"
    optimizer = (
        torch.optim.AdamW(groups, lr=cfg.lr, fused=cuda, **options)
        if adamw
        else build_timm_optimizer(groups, cfg, cfg.lr)
    )
    ema = ModelEmaV3(model, decay=case.recipe.ema.decay) if case.ema else None
    soft, hard = _timm_loss(case), nn.CrossEntropyLoss()

    def gradients(tensors: Sequence[Tensor | None]) -> Tensor:
        images, targets, labels = tensors
        assert images is not None
        assert targets is not None
        assert labels is not None
        optimizer.zero_grad(set_to_none=True)
        with case.precision.autocast():
            output = called(images)
            if case.recipe.model.distilled:
                loss = (soft(output[0], targets) + hard(output[1], labels)) / 2
            else:
                loss = soft(output, targets)
        loss.backward()
        return loss.detach()

    def update() -> None:
        optimizer.step()
        if ema is not None:
            ema.update(model)

    def whole(tensors: Sequence[Tensor | None]) -> Tensor:
        loss = gradients(tensors)
        update()
        return loss

    tensors = inputs.data.images, inputs.targets(), inputs.labels
    function = whole if adamw else gradients  # as in our graph: timm's LAMB takes its learning rate from the host
    run = Replayed(function, recorder or CudaRecorder(case.device)) if graph else function

    def step() -> int:
        run(tensors)
        if not adamw:
            update()
        return case.batch

    return step


def _timm_loss(case: ModelCase) -> nn.Module:
    cfg = case.recipe.objective
    if cfg.loss == "cross_entropy":
        return SoftTargetCrossEntropy()
    return BinaryCrossEntropy(smoothing=0.0, target_threshold=cfg.bce_target_thresh, sum_classes=cfg.bce_sum)


def disagreement(case: ModelCase, ours: Any) -> str | None:
    """Why our model must not be compared with timm's; None if both compute the same.

    With the weights of `ours`, logits and gradients of two images must agree in float32 to 1e-4 and 1e-3 of a tensor's
    largest value. In the timed precision, the error of our logits against timm's float32 logits may be twice timm's
    own. Both run without stochastic depth. Compiled forms are not checked: PyTorch derives them from these.
    """
    peer = timm_model(case, both_heads=True, drop_path=0.0).train()
    peer.load_state_dict(ours.state_dict())
    inputs = Inputs.draw(case, batch=2)
    exact = Precision("fp32", None, case.device)
    with _without_tf32():
        logits, gradients = _logits_and_gradients(peer, case, inputs, exact)
        our_logits, our_gradients = _logits_and_gradients(ours, case, inputs, exact)
    if our_logits.keys() != logits.keys() or our_gradients.keys() != gradients.keys():
        return "they differ in their heads or in which parameters have gradients"
    for what, values, expected, limit in (
        ("logits", our_logits, logits, 1e-4),
        ("gradients", our_gradients, gradients, 1e-3),
    ):
        name, distance = _worst(values, expected)
        if not distance <= limit:
            return f"{what} of {name} differ by {distance:.1e} of the largest in fp32, which is more than {limit:.0e}"
    if case.precision.dtype is not None:
        theirs = _worst(_logits_and_gradients(peer, case, inputs, case.precision)[0], logits)[1]
        name, distance = _worst(_logits_and_gradients(ours, case, inputs, case.precision)[0], logits)
        if not distance <= 2 * theirs:
            return f"logits of {name} lose {distance:.1e} in {case.precision.name}, where timm's lose {theirs:.1e}"
    return None


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Disable TF32 in products and convolutions: timm projects patches by a convolution, we by a GEMM."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _logits_and_gradients(model: Any, case: ModelCase, inputs: Inputs, precision: Precision) -> tuple[State, State]:
    """Logits by head, and gradients by parameter."""
    model.zero_grad(set_to_none=True)
    with precision.autocast():
        output = model(inputs.data.images)
    heads = output if isinstance(output, tuple) else (output, None)
    logits = {name: head for name, head in zip(("cls", "dist"), heads, strict=True) if head is not None}
    loss = SoftTargetCrossEntropy()(logits["cls"].float(), inputs.targets())
    if "dist" in logits:
        loss = loss + nn.functional.cross_entropy(logits["dist"].float(), inputs.labels)
    loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {name: head.detach() for name, head in logits.items()}, gradients


def _worst(values: State, expected: State) -> tuple[str, float]:
    distances = {
        name: float((values[name].float() - value.float()).abs().max() / value.float().abs().max())
        for name, value in expected.items()
    }
    # A NaN is worse than any number, but max() would ignore it.
    return max(distances.items(), key=lambda item: float("inf") if item[1] != item[1] else item[1])
