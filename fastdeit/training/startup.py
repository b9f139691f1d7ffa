"""What a run logs before its first step: its choices, and settings that are probably mistakes."""

import math

import torch

from fastdeit.budget.cards import find_card
from fastdeit.budget.plan import Images, Machine, Plan, plan
from fastdeit.config import Recipe
from fastdeit.data import TrainingData
from fastdeit.effects import evaluates, frozen_mode
from fastdeit.inputs import DataSets
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.checksums import unchecked
from fastdeit.pipelines.loaders.prefetch import usable_cores
from fastdeit.recipes import RECIPES
from fastdeit.setup import data_sentences
from fastdeit.teacher.label_cache import LabelCache
from fastdeit.training.logs import RunLog
from fastdeit.training.optim import learning_rate, peak_lr
from fastdeit.training.progress import duration
from fastdeit.training.step import TrainingStep
from fastdeit.training.timm_optim import why_slow
from fastdeit.version import __version__

FEW_IMAGES = 1000  # an epoch with fewer distinct images makes repeats worth a warning
NO_ACCURACY = "no validation images, so accuracy is not measured: give --data.val or --data.hold_out 0.1"
STALE_SHARE = 0.1  # of the initial weights in their average at the end of the run


def announce(
    log: RunLog,
    training: TrainingStep,
    data: TrainingData,
    sets: DataSets,
    *,
    run_id: str | None,
    labels: LabelCache | None,
    messages: list[str],
    warnings: list[str],
    forecast: Plan | None = None,
) -> None:
    """Log the start of a run: the "start" event, then sentences for people; `forecast` is for a run from its start."""
    recipe, world, kernels = training.recipe, training.world, training.kernels
    parameters = sum(p.numel() for p in training.model.parameters())
    log.event(
        "start",
        run=run_id,
        recipe=recipe.to_dict(),
        fastdeit=__version__,
        torch=torch.__version__,
        world=world.size,
        device=str(world.device),
        precision=training.precision.name,
        compiled=training.compiled,
        cuda_graphs=training.graphs[0],
        kernels=kernels.event(),
        optimizer=f"{recipe.optim.implementation} {recipe.optim.name}",
        loader=data.loader.name,
        stage=data.stage.name,
        steps_per_epoch=data.steps,
        parameters=parameters,
        peak_lr=peak_lr(recipe.optim, recipe.run.global_batch),
        forecast_seconds=None if forecast is None else round(forecast.total),
    )
    model = (
        f"{recipe.name}: {parameters / 1e6:.1f} M parameters, {sets.num_classes} classes, "
        f"{_images(sets)}, {data.steps} steps of {recipe.run.global_batch} an epoch, "
        f"{training.precision.name} on {world.size} x {world.device.type}"
        f"{', compiled (the first steps take a minute or so)' if training.compiled else ''}"
    )
    replayed, why = training.graphs
    sentences = [
        *messages,
        training.precision.note,
        model,
        None if evaluates(recipe) else NO_ACCURACY,
        lr_sentence(recipe),
        recipe.parts().sentence(),
        mode_sentence(recipe),
        skip_sentence(training),
        f"CUDA graphs {'on' if replayed else 'off'}: {why}" if world.device.type == "cuda" else None,
        kernels.sentence(),
        *data_sentences(data),
        *(unchecked(one.path, one.checksums) for one in (sets.train, sets.val) if one is not None),
        None if labels is None else _labels_sentence(labels),
        processes_sentence(recipe, world.size),
        None if forecast is None else forecast_sentence(forecast),
    ]
    if data.repeats != recipe.data.repeats:
        sentences.append("repeated augmentation is dropped on one process, as the released code does")
    for sentence in filter(None, sentences):
        log.say(sentence)
    for warning in filter(None, [*warnings, why_slow(training.optimizer, world.device)]):
        log.warn(warning)


def _images(sets: DataSets) -> str:
    total, trained, held = len(sets.train), len(sets.train_images), len(sets.val_images)
    if trained == total:
        return f"{total} images"
    kept = f" ({held} are held out for validation)" if sets.val is sets.train else ""
    return f"{trained} of {total} images{kept}"


def forecast_run(training: TrainingStep, sets: DataSets) -> Plan | None:
    """What `fastdeit budget` forecasts for this run on these GPUs; None if it does not know the card or the recipe."""
    recipe, world = training.recipe, training.world
    if world.device.type != "cuda" or training.precision.name != "bf16":
        return None
    images = Images(train=len(sets.train_images), val=len(sets.val_images), classes=sets.num_classes, bytes=0.0)
    try:
        name = torch.cuda.get_device_name(world.device)
        card = find_card(name)
        # A part of a card (MIG), or another form of it, is not the card of the table.
        if torch.cuda.get_device_properties(world.device).total_memory < 0.85 * card.memory or "Laptop" in name:
            return None
        machine = Machine(card=card, gpus=world.size, cores=usable_cores(), most=world.local_size)
        return plan(recipe, machine, images)
    except UserError:
        return None


def forecast_sentence(forecast: Plan) -> str:
    largest = " at full size" if forecast.earlier else ""
    return (
        f"forecast: {duration(forecast.total)} for the whole run, at {forecast.speed:,.0f} images/s{largest}; what "
        f"limits it is {forecast.bottleneck} (fastdeit budget)"
    )


def _labels_sentence(labels: LabelCache) -> str:
    described = labels.described
    return f"{described.kind} labels of teacher {described.teacher_name} from {labels.folder}"


def _depends_on_processes(recipe: Recipe) -> list[str]:
    """What a different number of processes changes, beyond rounding."""
    parts = []
    if recipe.model.arch != "deit" and recipe.model.drop_rate > 0 and not frozen_mode(recipe):
        parts.append("each process draws dropout for its own share of the batch (model.drop_rate)")
    if recipe.model.arch != "deit":
        parts.append("batch normalisation takes its statistics over each process's share of the batch")
    if recipe.departures.mix_group == 0:
        parts.append("a mixing group is a process's share of the batch (departures.mix_group 0)")
    return parts


def processes_sentence(recipe: Recipe, processes: int) -> str | None:
    """A sentence on what a different number of processes would change; None if nothing but rounding."""
    parts = _depends_on_processes(recipe)
    if processes == 1 or not parts:
        return None
    return f"the result depends on the number of processes ({processes}): {'; '.join(parts)}"


def other_processes_sentence(recipe: Recipe, before: int | None, now: int) -> str | None:
    """A sentence on what a change from `before` to `now` processes does; None if there is none or `before` is None."""
    if before is None or before == now:
        return None
    what = "; ".join(_depends_on_processes(recipe)) or "the losses differ by rounding only"
    return f"the number of processes has changed from {before} to {now}: {what}"


def lr_sentence(recipe: Recipe) -> str:
    """The learning rate after scaling with the batch."""
    cfg, batch = recipe.optim, recipe.run.global_batch
    scaled = f" ({cfg.lr:g} x global batch {batch} / {cfg.lr_batch})" if cfg.lr_batch else ""
    warm_up = f" after {cfg.warmup_epochs:g} epochs of warm-up" if cfg.warmup_epochs else ""
    layers = f", each layer's {cfg.layer_decay:g} times the next layer's" if cfg.layer_decay != 1 else ""
    return f"learning rate {peak_lr(cfg, batch):g}{scaled}{warm_up}{layers}, {cfg.name}"


def mode_sentence(recipe: Recipe) -> str | None:
    """How a run that starts from trained weights treats dropout and stochastic depth; None for any other run."""
    model, mode = recipe.model, recipe.departures.finetune_mode
    if model.init is None:
        return None
    noise = f"stochastic depth {model.drop_path:g} and dropout {model.drop_rate:g}"
    if frozen_mode(recipe):
        return f"fine-tuning {model.init} in eval mode: {noise} are off (departures.finetune_mode '{mode}')"
    return f"fine-tuning {model.init} in training mode, with {noise} (departures.finetune_mode '{mode}')"


def skip_sentence(training: TrainingStep) -> str | None:
    """How many samples stochastic depth leaves out of each block; None if each sample is drawn on its own."""
    dropped, group = training.dropped, training.group
    if dropped is None:
        return None
    model = training.recipe.model
    numbers, rates = ", ".join(map(str, dropped)), training.rates
    return (
        f"stochastic depth: of each {group} samples, both branches of the blocks drop exactly {numbers}, "
        f"{dropped.mean() / group:.2%} on average and {dropped[-1] / group:.2%} in the last block; model.drop_path "
        f"{model.drop_path:g} asks for {rates.mean():.2%} and {rates[-1]:.2%}. The paper draws each "
        f"sample on its own (model.drop_path_mode 'mask')"
    )


def recipe_warnings(recipe: Recipe, sets: DataSets, *, steps: int, repeats: int) -> list[str]:
    """A sentence for each setting that is probably a mistake.

    steps    steps per epoch
    repeats  copies of each image in a batch
    """
    return [
        *_other_batch(recipe),
        *_warm_up(recipe, steps),
        *_average(recipe, steps),
        *_few_images(recipe, len(sets.train_images), steps, repeats),
        *_same_data(recipe, sets),
    ]


def _other_batch(recipe: Recipe) -> list[str]:
    """A warning if the batch of a named recipe was changed, but not its learning rate, which does not scale."""
    if recipe.name not in RECIPES:
        return []
    named, batch, lr = RECIPES[recipe.name](), recipe.run.global_batch, recipe.optim.lr
    scales = recipe.optim.lr_batch or named.optim.lr_batch
    if scales or batch == named.run.global_batch or lr != named.optim.lr:
        return []
    return [
        f"run.global_batch is {batch} instead of the recipe's {named.run.global_batch}, but its learning rate {lr:g} "
        f"does not scale with the batch (optim.lr_batch 0). Set --optim.lr, or scale it with --optim.lr_batch "
        f"{named.run.global_batch}"
    ]


def _warm_up(recipe: Recipe, steps: int) -> list[str]:
    cfg, epochs = recipe.optim, recipe.run.epochs
    if cfg.warmup_epochs < epochs:
        return []
    last = learning_rate(recipe, epochs - 1, steps - 1, steps)
    top = peak_lr(cfg, recipe.run.global_batch)
    return [
        f"optim.warmup_epochs {cfg.warmup_epochs:g} is not shorter than the run ({epochs} epochs): the learning rate "
        f"only climbs, to {last:.3g} instead of {top:.3g}. Set a shorter --optim.warmup_epochs"
    ]


def _average(recipe: Recipe, steps: int) -> list[str]:
    total = recipe.run.epochs * steps
    share = recipe.ema.decay**total
    if not recipe.ema.enabled or share < STALE_SHARE:
        return []
    fitting = 1 - 10 / total  # a tenth of the run's length as its memory
    return [
        f"the averaged weights (ema.decay {recipe.ema.decay:g}) hardly move in {total} steps: at the end they "
        f"are {100 * share:.0f}% initial weights. Set --ema.decay {max(fitting, 0.5):.4g}, or --ema.enabled False"
    ]


def _few_images(recipe: Recipe, images: int, steps: int, repeats: int) -> list[str]:
    distinct = math.ceil(steps * recipe.run.global_batch / repeats)
    if repeats == 1 or distinct >= FEW_IMAGES:
        return []
    return [
        f"an epoch shows only {distinct} of the {images} images, {repeats} times each (data.repeats): for so small a "
        f"data set use --data.repeats 1"
    ]


def _same_data(recipe: Recipe, sets: DataSets) -> list[str]:
    train, val = sets.train, sets.val
    if val is None or recipe.data.hold_out:
        return []
    same_content = train.content_hash is not None and train.content_hash == val.content_hash
    if not same_content and train.path.resolve() != val.path.resolve():
        return []
    return [
        f"data.val {val.path} holds the same images as data.train {train.path}: the accuracy on it says nothing about "
        f"new images"
    ]
