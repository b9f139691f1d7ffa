"""A model of the training step's time: its GEMMs, its passes over memory, its launches.

`predict` takes a recipe's model configuration and a card, and needs no GPU. It models the step that fastdeit runs on a
GPU with its kernels and torch.compile: bf16 products, AdamW, stochastic depth in either mode, the last block reduced to
the prefix tokens. `work.py` counts the work; kernel start-up times and launch counts come from profiles.

Not in the model: a teacher that runs beside the student, clipping, micro-batches, fp32 and fp16, several GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastdeit.budget.cards import Card
from fastdeit.budget.work import BF16, FP32, GAPS, PARTS, Inputs, Shape, Work, checked, gemms, passes, update_of
from fastdeit.pipelines.errors import UserError
from fastdeit.sections import ModelConfig

# Seconds from one kernel of a CUDA graph to the next: 3.4 a kernel of 2.9 microseconds (NVIDIA technical blog, "Getting
# Started with CUDA Graphs", on a V100).
GAP = 0.5e-6
# Without a graph: seconds of Python that one of our operators takes (74 to 134 microseconds, forward or backward), and
# seconds of the host for any other launch (3.8 microseconds, the same blog).
HOST_OPERATOR, HOST_LAUNCH = 104e-6, 3.8e-6


def parameters(model: ModelConfig, num_classes: int = 1000) -> int:
    """The number of a DeiT's parameters."""
    return Shape(checked(model), 1, num_classes).parameters


def memory(
    model: ModelConfig, batch: int, *, num_classes: int = 1000, ema: bool = False, optimizer: str = "adamw"
) -> float:
    """Bytes that a training step of `batch` images holds on a GPU: parameters, what backward needs, and the batch.

    An `optimizer` that `UPDATES` lacks counts as AdamW. The result is 2 to 5% less than was reserved on an H200 for Ti,
    S and B (docs/roof.md). Raises UserError for another `arch`.
    """
    shape = Shape(checked(model), batch, num_classes)
    stream = BF16 if model.residual_dtype == "bfloat16" else FP32
    # Weight, gradient and both moments; the average; the weights in bf16 that the backward pass reads.
    held = update_of(optimizer).held
    states = shape.parameters * (4 * FP32 + FP32 * ema + held) + shape.matrices * BF16
    # A block keeps both sums of the stream, both normalisations, queries, keys, values, the result of attention, and
    # the hidden layer before and after the GELU.
    block = 2 * stream * shape.width + BF16 * (6 * shape.width + 2 * shape.hidden)
    last = stream * shape.width + BF16 * 4 * shape.width
    if model.layer_scale:  # the gradient of its factors needs both branches, and in the last block few rows of them
        block += 2 * BF16 * shape.width
    kept = shape.rows * (block * (model.depth - 1) + last + stream * shape.width)
    if model.grad_checkpointing:  # the stream and the branch between two blocks, and one block at a time
        kept = shape.rows * ((stream + BF16) * shape.width * model.depth + block)
    pixels = shape.batch * shape.patches * shape.patch_values
    return states + kept + pixels * (2 * FP32 + BF16)


@dataclass(frozen=True)
class PartTime:
    """Seconds of a part of a step: by the model, and at the roof; and its launches."""

    seconds: float
    ideal: float
    launches: int


@dataclass(frozen=True)
class StepTime:
    """The predicted time of a training step.

    images  of the batch
    parts   by the names of `PARTS`; together the device's time
    host    seconds of the host if no graph is used; the step takes the longer of both
    """

    images: int
    parts: dict[str, PartTime]
    host: float

    @property
    def seconds(self) -> float:
        return max(self.host, sum(part.seconds for part in self.parts.values()))

    @property
    def ideal(self) -> float:
        """Seconds with every part at the roof, without gaps and host."""
        return sum(part.ideal for part in self.parts.values())

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def launches(self) -> int:
        return sum(part.launches for part in self.parts.values())


def predict(
    model: ModelConfig,
    card: Card,
    *,
    batch: int = 256,
    num_classes: int = 1000,
    inputs: Inputs = "images",
    ema: bool = False,
    optimizer: str = "adamw",
    graph: bool = True,
) -> StepTime:
    """The time of a training step of a DeiT on one GPU, by part.

    model      of a recipe; see the file's docstring for what the model of time leaves out
    batch      images a step
    inputs     "images": (B, 3, S, S) float32, as in the throughput benchmark. "patches": bf16 in patches, as the device
               augmentation writes them
    ema        average the weights
    optimizer  one of `UPDATES`; another one counts as AdamW
    graph      replay the step as one CUDA graph; otherwise the host launches every kernel

    Raises UserError for another `arch` and for a batch below 1.
    """
    if batch < 1:
        raise UserError(f"the batch is {batch}: it must be at least 1")
    work: list[Work] = [
        *gemms(model, batch, num_classes=num_classes),
        *passes(model, batch, num_classes=num_classes, inputs=inputs, ema=ema, optimizer=optimizer),
    ]
    parts = {part: _total([each for each in work if each.part == part], card) for part in PARTS}
    launches = sum(part.launches for part in parts.values())
    parts[GAPS] = PartTime(GAP * launches, 0.0, 0)
    operators = 2 * (4 * model.depth + 3)  # four a block, the first and last LayerNorm, tokens; forward and backward
    host = 0.0 if graph else operators * HOST_OPERATOR + (launches - operators) * HOST_LAUNCH
    return StepTime(batch, {name: part for name, part in parts.items() if part.seconds}, host)


def _total(work: Sequence[Work], card: Card) -> PartTime:
    def total(values: Iterable[float]) -> float:
        return sum(each.count * value for each, value in zip(work, values, strict=True))

    return PartTime(
        total(each.seconds(card) for each in work),
        total(each.ideal(card) for each in work),
        sum(each.count * each.kernels for each in work),
    )
