"""`fastdeit-eval`: accuracy of a checkpoint on a data set."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from fastdeit import launch
from fastdeit.cli import parse, program, run
from fastdeit.config import Recipe
from fastdeit.inputs import check_checkpoint, check_class_names, checkpoint_file, open_dataset, open_runs_set
from fastdeit.on_demand import converted
from fastdeit.pipelines import console
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.dataset import Dataset
from fastdeit.recipes import recipe_named
from fastdeit.streams import keep_streams
from fastdeit.subsets import divide

if TYPE_CHECKING:
    from fastdeit.loading import OpenedCheckpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Top-1, top-5 and loss of every head of a checkpoint; also ReaL accuracy if the data set holds ReaL's labels."""

    checkpoint: Annotated[Path, tyro.conf.Positional]  # checkpoint of fastdeit, DeiT or timm, or a run's folder
    # what fastdeit-convert wrote, or a folder or archive of images; None: the run's own validation images
    val: Annotated[Path | None, tyro.conf.Positional] = None
    recipe: str | None = None  # needed if the checkpoint does not hold its own, e.g. deit_small_distilled
    weights: Literal["model", "ema", "both"] = "both"  # both: ema too if the checkpoint has it
    img_size: int | None = None  # resolution, if it is not the recipe's; the position embedding is resized
    batch: int = 256
    threads: int = 0
    loader: Literal["auto", "turbo", "ffcv", "dali", "torch"] = "auto"
    stage: Literal["auto", "device", "host"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    kernels: Literal["auto", "triton", "torch"] = "auto"
    json: bool = False  # print one JSON object instead of a table


def evaluate_checkpoint(options: Options) -> dict[str, Any]:
    """Scores by kind of weights. Raises UserError where checkpoint, recipe and data set do not fit together."""
    val = _checked(options)
    # Imported here: mistakes in the command are found without waiting for PyTorch.
    from fastdeit.distributed import world
    from fastdeit.loading import open_checkpoint
    from fastdeit.memory import moved
    from fastdeit.model.kernel_choice import choose_kernels
    from fastdeit.pipelines.formats.checksums import unchecked
    from fastdeit.setup import open_evaluation_data, set_up, silent
    from fastdeit.training.evaluation import evaluate

    opened = open_checkpoint(options.checkpoint, options.recipe, options.img_size)
    recipe = _with_options(opened.recipe, options)
    val, images = (val, None) if val is not None else _runs_own(opened)
    kinds: list[Literal["model", "ema"]] = ["model", "ema"] if options.weights == "both" else [options.weights]
    if options.weights == "both" and not opened.has_average:
        kinds = ["model"]
    with world(options.device) as joined:
        verbose = joined.main and not options.json
        say = console.say if verbose else silent
        precision = set_up(recipe, joined)
        named = opened.described.get("class_names")
        check_class_names(str(options.checkpoint), named, str(val.path), val.class_names)
        classes = recipe.model.num_classes or val.num_classes
        kernels = choose_kernels(recipe.model, precision, classes, joined)
        data = open_evaluation_data(recipe, val, joined, precision, kernels, images=images, say=say)
        if precision.note:
            say(precision.note)
        if opened.path != options.checkpoint:
            say(f"the newest checkpoint of the run: {opened.path}")
        if options.val is None:
            which = "" if images is None else f", the {len(images)} images that the run held out"
            say(f"the run's data set: {val.path}{which}")
        say(kernels.sentence())
        say(f"loader {data.loader.name}: {data.loader.reason}")
        say(f"images made on the {data.stage.name}: {data.stage.reason}")
        without = unchecked(val.path, val.checksums)
        if joined.main and without is not None:
            console.say(without, "stderr")
        out: dict[str, Any] = {}
        try:
            for kind in kinds:
                model, messages = opened.network(classes, kind, kernels, f"cannot be evaluated on {val.path}")
                for message in messages:
                    say(message)
                moved(model, joined.device)
                out[kind] = evaluate(
                    model, data, joined, precision, kernels=kernels, progress=verbose, batch_option="--batch"
                )
        finally:
            data.close()
        return out if joined.main else {}


def _checked(options: Options) -> Dataset | None:
    """Make the checks that need no PyTorch; return the data set that the command names, if any. Raises UserError."""
    if options.recipe is not None:
        recipe_named(options.recipe)
    check_checkpoint(checkpoint_file(options.checkpoint))
    return None if options.val is None else open_dataset(converted(options.val), "val")


def _runs_own(opened: "OpenedCheckpoint") -> tuple[Dataset, np.ndarray | None]:
    """The data set that the run evaluated on, and the indices of its held-out images, if any. Raises UserError."""
    from fastdeit.training.run_record import started_in  # here, since it needs PyTorch

    cfg, started = opened.recipe.data, started_in(opened.path.parent.parent)
    if cfg.val is not None:
        return open_runs_set(cfg.val, "data.val", started), None
    if not cfg.hold_out:
        raise UserError(f"{opened.path} names no data set that it was evaluated on: name a data set after it")
    train = open_runs_set(cfg.train, "data.train", started, opened.trained_on)
    return train, divide(cfg, train.label).held_out


def _with_options(recipe: Recipe, options: Options) -> Recipe:
    replace = dataclasses.replace
    return replace(
        recipe,
        model=replace(recipe.model, kernels=options.kernels),
        data=replace(recipe.data, loader=options.loader, stage=options.stage, threads=options.threads),
        run=replace(recipe.run, eval_batch=options.batch, precision=options.precision),
    ).resolved()


def table(results: dict[str, Any]) -> str:
    """The scores as text, one line per head, and a line if PIL had to read images."""
    real = any("real_images" in scores for scores in results.values())
    lines = [f"{'weights':8} {'head':20} {'top-1 %':>8} {'top-5 %':>8} {'loss':>8}" + f" {'ReaL %':>8}" * real]
    for kind, scores in results.items():
        for head, values in scores.items():
            if isinstance(values, dict):
                line = f"{kind:8} {head:20} {values['top1']:8.2f} {values['top5']:8.2f} {values['loss']:8.4f}"
                lines.append(line + (f" {values['real']:8.2f}" if real else ""))
        if real:
            lines.append(f"{kind}: ReaL over the {scores['real_images']} of {scores['images']} images with such labels")
        if "fallbacks" in scores:
            lines.append(f"{kind}: PIL read {scores['fallbacks']} images that the loader's decoder refused")
        if "replaced" in scores:
            lines.append(f"{kind}: held-out images replaced because they do not decode: {scores['replaced']}")
    return "\n".join(lines)


def main() -> None:
    def go() -> None:
        keep_streams()
        options = parse(Options, program("eval"))
        launch.prepare()
        results = evaluate_checkpoint(options)
        if results:
            print(json.dumps(results) if options.json else table(results))

    run(go)


if __name__ == "__main__":
    main()
