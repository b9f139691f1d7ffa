"""A training step: forward pass, loss, backward pass, update of the weights and of their average."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from fastdeit.config import Recipe
from fastdeit.data import TrainBatch
from fastdeit.distributed import World
from fastdeit.effects import skips_samples
from fastdeit.model.deit import DeiT
from fastdeit.model.kernel_choice import TORCH, Kernels
from fastdeit.model.networks import ConvnetStudent
from fastdeit.pipelines.batch import Batch
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.plan.drop_path import draw_drop_path, draw_fixed_drop_path, drop_path_rates, dropped_samples
from fastdeit.pipelines.plan.dropout import draw_dropout_keys
from fastdeit.precision import COMPILER, Precision, compiles
from fastdeit.teacher.teacher import Teacher
from fastdeit.training.gradients import SharedGradients
from fastdeit.training.graphs import CudaRecorder, RecordingError, Replayed, choose_graphs, why_update_stays_out
from fastdeit.training.objective import LossParts, build_objective
from fastdeit.training.optim import (
    Ema,
    build_optimizer,
    clip_gradients,
    learning_rate,
    load_optimizer,
    optimizer_state,
    set_lr,
)
from fastdeit.training.profiling import LABEL


class StoredLabels(Protocol):
    """Labels that a teacher made beforehand: `label_cache.LabelCache`."""

    def labels(self, epoch: int, entries: np.ndarray) -> Tensor: ...

    def logits(self, epoch: int, entries: np.ndarray) -> Tensor: ...


@dataclass(frozen=True)
class StepInputs:
    """The inputs of a step, on its device.

    data    images and labels
    masks   (depth, 2, B) float32 factors of stochastic depth; None: none
    keys    (B,) int64 keys of dropout; None: none
    stored  the teacher's stored labels (B,) int64 or logits (B, K) float32; None without them
    """

    data: Batch
    masks: Tensor | None
    keys: Tensor | None
    stored: Tensor | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors, in the order that `of` takes."""
        return self.masks, self.keys, self.stored, *self.data.tensors()

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None]) -> StepInputs:
        masks, keys, stored, *data = tensors
        return cls(Batch(*data), masks, keys, stored)  # pyright: ignore[reportArgumentType]


class TrainingStep:
    """The step of one process, and what it changes: model, optimizer, loss scale, average.

    Everything random in a step is a function of (seed, step), so `state` holds all there is to save.

    model      on the run's device; compilation does not change the names of its parameters
    kernels    which Triton kernels compute the loss
    teacher    labels the batches for the student; None without distillation, or with stored `labels`
    labels     labels that a teacher made beforehand
    compiled   whether torch.compile made one graph each of student, teacher and loss
    group      number of samples in a mixing group
    dropped    (depth,) how many samples of a group each branch of a block skips; None: it computes all
    graphs     whether steps are replayed as one CUDA graph, and why
    whole      whether that graph holds the update of the weights too
    shared     sums the gradients of several processes; None for one process, and before `distribute`
    warn       takes a sentence for the user
    lr         the learning rate of the last step

    Raises UserError if the recipe asks for something that is not available here.
    """

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        precision: Precision,
        model: DeiT | ConvnetStudent,
        kernels: Kernels = TORCH,
        *,
        num_classes: int,
        steps_per_epoch: int,
        teacher: Teacher | None = None,
        labels: StoredLabels | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.recipe, self.world, self.precision = recipe, world, precision
        self.model, self.kernels, self.teacher, self.labels = model, kernels, teacher, labels
        self.objective: Callable[..., LossParts] = build_objective(
            recipe.objective,
            recipe.model.distilled,
            recipe.departures,
            kernels="distillation_loss" in kernels.ops,
        )
        self.num_classes, self.steps_per_epoch = num_classes, steps_per_epoch
        self.warn, self.lr = warn, 0.0
        self.parameters = list(model.parameters())
        self.compiled = compiles(recipe, world.device)
        if isinstance(model, DeiT):
            model.accept_sizes(recipe.parts().sizes)
        if self.compiled:
            # Compile each shape separately, so that results do not depend on which shapes came before. Evaluation and a
            # curriculum need several shapes.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
            self.model.compile(backend=COMPILER, dynamic=False)
            self.objective = torch.compile(self.objective, backend=COMPILER, dynamic=False)
        if self.teacher is not None:
            self.teacher.settle(world.device, precision.dtype, compiled=self.compiled)
        self.optimizer = build_optimizer(model, recipe, scaled=precision.name == "fp16")
        self.ema = Ema(model, recipe.ema.decay) if recipe.ema.enabled else None
        self.scaler = torch.amp.GradScaler(world.device.type) if precision.name == "fp16" else None
        self.group, cfg = recipe.mixing_group(world.size), recipe.model
        self.rates = drop_path_rates(cfg.depth, cfg.drop_path, uniform=cfg.drop_path_uniform)
        self.dropped = dropped_samples(self.rates, self.group) if skips_samples(recipe) else None
        self.graphs = choose_graphs(recipe, world, precision)
        self.whole = why_update_stays_out(recipe, precision) is None
        self.shared: SharedGradients | None = None
        self._replayed: Replayed | None = None
        self._size = 0  # side of the images of the last step

    def distribute(self) -> None:
        """Let the processes of the run share their gradients from now on, starting from the main process's weights.

        Raises UserError if the processes hold different networks.
        """
        if self.world.size == 1:
            return
        state = self.model.state_dict()
        form = [(name, tuple(value.shape), str(value.dtype)) for name, value in state.items()]
        if not self.world.same(zlib.crc32(repr(form).encode())):
            raise UserError("the processes hold different networks: give all of them the same recipe and fastdeit")
        self.world.broadcast([*state.values(), *(self.ema.shadow.values() if self.ema is not None else ())])
        self.shared = SharedGradients(self.model.named_parameters())

    def state(self) -> dict[str, Any]:
        """`model` and `ema` (in timm's names), `optimizer` and `scaler`; None for a part that the run lacks."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.shadow if self.ema is not None else None,
            "optimizer": optimizer_state(self.optimizer),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state` returned."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load(state["ema"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        self._forget_recording()  # a graph recorded earlier would update other tensors

    def __call__(
        self,
        batch: TrainBatch,
        epoch: int,
        step: int,
        global_step: int,
        check: Callable[[LossParts], None] | None = None,
    ) -> LossParts:
        """Update the weights once; returns the mean losses of this process's share.

        `check` is called with the losses before the weights move, and makes the host wait for a GPU. A step that is
        replayed with its update does not call it.
        """
        # A convnet's dropout and stochastic depth draw from PyTorch's generator, so it is seeded by the step too.
        seed = ((self.recipe.run.seed * 1_000_003 + global_step) * 4099 + self.world.rank) % 2**63
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds every device, and is slow without a GPU
        if self.world.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        size = self.recipe.parts().size(epoch)
        if size != self._size:  # a curriculum's next part
            self._forget_recording()
            self._size = size
        self.lr = learning_rate(self.recipe, epoch, step, self.steps_per_epoch)
        set_lr(self.optimizer, self.lr)
        inputs = self._inputs(batch, epoch, step, global_step)
        replayed = self._replay(inputs) if self.graphs[0] else None
        if replayed is not None and self.whole:
            return LossParts(*replayed)
        losses = self._gradients(inputs) if replayed is None else replayed
        if check is not None:
            check(LossParts(*losses))
        self._update()
        return LossParts(*losses)

    def _replay(self, inputs: StepInputs) -> Tensor | None:
        """The losses of a replayed step; None if it cannot be recorded, here or on another process: it has not run."""
        if self._replayed is None:
            self._replayed = Replayed(self._recorded, CudaRecorder(self.world.device), self.world.first)
        try:
            return self._replayed(inputs.tensors())
        except RecordingError as error:
            if self.recipe.run.cuda_graphs == "on":
                raise
            reason = error.reason
        self._forget_recording()
        self.graphs = False, reason
        self.warn(
            f"a step cannot be recorded as a CUDA graph ({reason}). Training goes on without one, from the same "
            f"weights; launching the kernels one by one costs the host several milliseconds a step. "
            f"--run.cuda_graphs off skips the attempt"
        )
        return None

    def _forget_recording(self) -> None:
        if self._replayed is not None:
            self.optimizer.zero_grad()  # these gradients lie in the memory of the recording
            self._replayed.discard()
            self._replayed = None

    def _recorded(self, tensors: Sequence[Tensor | None]) -> Tensor:
        losses = self._gradients(StepInputs.of(tensors))
        if self.whole:
            self._update()
        return losses

    def _inputs(self, batch: TrainBatch, epoch: int, step: int, global_step: int) -> StepInputs:
        data = Batch(*(self._on_device(tensor) for tensor in batch.data.tensors()))
        entries = step * self.recipe.run.global_batch + batch.position
        masks, keys = self._drop_path(batch.position, global_step), self._dropout_keys(batch.position, global_step)
        return StepInputs(data, masks, keys, self._stored(epoch, entries))

    def _on_device(self, tensor: Tensor) -> Tensor:
        if self.world.device.type == "cuda" and not tensor.is_cuda:
            # The host would wait for a copy from pageable memory. PyTorch keeps this tensor until the copy is done.
            tensor = tensor.pin_memory()
        return tensor.to(self.world.device, non_blocking=True)

    def _drop_path(self, positions: np.ndarray, global_step: int) -> Tensor | None:
        cfg = self.recipe.model
        if cfg.arch != "deit" or cfg.drop_path == 0 or not self.model.training:
            return None
        drawn = self.recipe.run.seed, global_step, positions
        if self.dropped is None:
            masks = draw_drop_path(*drawn, self.rates)
        else:
            masks = draw_fixed_drop_path(*drawn, self.dropped, self.group)
        return self._on_device(torch.from_numpy(masks))

    def _dropout_keys(self, positions: np.ndarray, global_step: int) -> Tensor | None:
        cfg = self.recipe.model
        if cfg.arch != "deit" or cfg.drop_rate == 0 or not self.model.training:
            return None
        return self._on_device(torch.from_numpy(draw_dropout_keys(self.recipe.run.seed, global_step, positions)))

    def _set_noise(self, inputs: StepInputs, part: slice) -> None:
        """Set stochastic depth and dropout for the next samples; a model that skips needs whole mixing groups."""
        masks = None if inputs.masks is None else inputs.masks[..., part]
        kept = None
        if masks is not None and self.dropped is not None:
            kept = (masks.shape[-1] // self.group * (self.group - self.dropped)).tolist()
        self.model.set_drop_path(masks, kept)
        self.model.set_dropout(None if inputs.keys is None else inputs.keys[part])

    def _stored(self, epoch: int, entries: np.ndarray) -> Tensor | None:
        if self.labels is None:
            return None
        hard = self.recipe.objective.distillation == "hard"
        return self._on_device((self.labels.labels if hard else self.labels.logits)(epoch, entries))

    def _teach(self, images: Tensor, stored: Tensor | None) -> Tensor | None:
        """The teacher's hard labels (B,) or logits (B, K) of the images that the student sees."""
        if self.teacher is None:
            return stored
        hard = self.recipe.objective.distillation == "hard"
        with record_function(LABEL + "teacher"):
            return self.teacher.labels(images) if hard else self.teacher.logits(images)

    def _gradients(self, inputs: StepInputs) -> Tensor:
        """Gradients of this process's share of a step; (3,) float32, the mean losses of the share."""
        images = inputs.data.images
        count = len(images)
        labels = inputs.data.labels(self.recipe.augment.label_smoothing)
        micro = self.recipe.run.micro_batch or count
        total: list[Tensor] = []
        self.optimizer.zero_grad()
        for start in range(0, count, micro):
            part = slice(start, min(start + micro, count))
            share = (part.stop - part.start) / count
            last = part.stop == count
            self._set_noise(inputs, part)
            stored = None if inputs.stored is None else inputs.stored[part]
            with self.precision.autocast():
                teacher = self._teach(images[part], stored)
                student = self.model(images[part])
                with record_function(LABEL + "loss"):
                    loss = self.objective(student, labels.part(part), teacher)
            # The sum over the processes is then their mean.
            weighted = loss.loss * (share / (self.shared.processes if self.shared is not None else 1))
            with self.shared.summing() if self.shared is not None and last else nullcontext():
                (self.scaler.scale(weighted) if self.scaler else weighted).backward()
            total.append(torch.stack([loss.loss, loss.base, loss.distill]).detach().float() * share)
        return torch.stack(total).sum(0)

    def _update(self) -> None:
        limit = self.recipe.optim.clip_grad
        with record_function(LABEL + "optimizer"):
            if self.scaler is not None:
                if limit is not None:
                    self.scaler.unscale_(self.optimizer)
                    clip_gradients(self.parameters, limit)
                self.scaler.step(self.optimizer)
                self.scaler.update()
            else:
                clip_gradients(self.parameters, limit)
                self.optimizer.step()
        if self.ema is not None:
            with record_function(LABEL + "average"):
                self.ema.update()
