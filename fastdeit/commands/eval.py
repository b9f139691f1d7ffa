"""`fastdeit-eval`: accuracy of a checkpoint on a data set."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from fastdeit import launch
from fastdeit.cli import check_least, parse, program, run
from fastdeit.commands.corruptions import Sets, corrupted_sets, corruption_errors, corruption_table
from fastdeit.commands.per_class import check_new_file, write_classes
from fastdeit.commands.probe_images import probe_columns, same_images
from fastdeit.config import Recipe
from fastdeit.inputs import (
    check_checkpoint,
    checkpoint_file,
    class_columns,
    open_dataset,
    open_runs_set,
)
from fastdeit.on_demand import converted
from fastdeit.pipelines import console
from fastdeit.pipelines.console import answer
from fastdeit.pipelines.errors import UserError, printable
from fastdeit.pipelines.formats.dataset import Dataset
from fastdeit.recipes import recipe_named
from fastdeit.streams import keep_streams
from fastdeit.subsets import divide

if TYPE_CHECKING:
    from torch import Tensor

    from fastdeit.data import EvaluationData
    from fastdeit.distributed import World
    from fastdeit.loading import OpenedCheckpoint
    from fastdeit.model.deit import DeiT
    from fastdeit.model.kernel_choice import Kernels
    from fastdeit.model.networks import ConvnetStudent
    from fastdeit.precision import Precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Top-1, top-5, loss and calibration error of every head of a checkpoint, on one data set or several.

    Also ReaL accuracy if a data set holds ReaL's labels. A data set may have some of the checkpoint's classes, as
    ImageNet-A and ImageNet-R do: then only these classes can be chosen.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]  # checkpoint of fastdeit, DeiT or timm, or a run's folder
    # data sets that fastdeit-convert wrote, or folders or archives of images; none: the run's own validation images
    val: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    recipe: str | None = None  # needed if the checkpoint does not hold its own, e.g. deit_small_distilled
    arch: str | None = None  # for a checkpoint of a timm model, such as a teacher: its name in timm, e.g. regnety_160
    probe: Path | None = None  # training images: also score a k-NN and a linear classifier on the frozen features
    weights: Literal["model", "ema", "both"] = "both"  # both: ema too if the checkpoint has it
    img_size: int | None = None  # resolution, if it is not the recipe's; a DeiT's position embedding is resized
    batch: int = 256
    threads: int = 0
    loader: Literal["auto", "turbo", "ffcv", "dali", "torch"] = "auto"
    stage: Literal["auto", "device", "host"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    kernels: Literal["auto", "triton", "torch"] = "auto"
    corruptions: Path | None = None  # a folder with ImageNet-C's CORRUPTION/SEVERITY folders: mean corruption error
    per_class: Path | None = None  # a new CSV file for the scores of each class
    json: bool = False  # print one JSON object instead of a table


def evaluate_checkpoint(options: Options, corrupted: Sequence[Path] = ()) -> dict[str, dict[str, Any]]:
    """Scores by data set and kind of weights, as `evaluate` gives them; on other processes than the main one, none.

    corrupted  more data sets, those of `corruptions`

    Raises UserError where checkpoint, recipe and data sets do not fit together.
    """
    sets, probe, probed = _checked(options, corrupted)
    # Imported here: mistakes in the command are found without waiting for PyTorch.
    from fastdeit.distributed import world
    from fastdeit.loading import open_checkpoint
    from fastdeit.model.kernel_choice import choose_kernels
    from fastdeit.setup import set_up, silent

    said: list[str] = []
    named = options.recipe
    if options.arch is not None:
        from fastdeit.loading import timm_recipe

        named, said = timm_recipe(options.arch)
    opened = open_checkpoint(options.checkpoint, named, options.img_size)
    recipe = _with_options(opened.recipe, options)
    images = None
    if not sets:
        own, images = _runs_own(opened)
        sets = {str(own.path): own}
        probed = probe_columns(probe, sets)
    names = opened.described.get("class_names")
    classes, columns = _classes(str(options.checkpoint), names, recipe.model.num_classes, sets)
    with world(options.device) as joined:
        say = console.say if joined.main and not options.json else silent
        precision = set_up(recipe, joined)
        kernels = choose_kernels(recipe.model, precision, classes, joined)
        if precision.note:
            said.append(precision.note)
        if opened.path != options.checkpoint:
            said.append(f"the newest checkpoint of the run: {opened.path}")
        for sentence in (*said, kernels.sentence()):
            say(sentence)
        evaluation = _Evaluation(opened, recipe, joined, precision, kernels, classes, probe, say)
        out: dict[str, dict[str, Any]] = {}
        for path, val in sets.items():
            if not (options.val or corrupted):
                which = "" if images is None else f", the {len(images)} images that the run held out"
                say(f"the run's data set: {path}{which}")
            out[path] = evaluation.on(val, images, columns[path], probed[path], options)
    return out if joined.main else {}


def _classes(
    checkpoint: str, names: list[str] | None, count: int | None, sets: dict[str, Dataset]
) -> tuple[int, dict[str, list[int] | None]]:
    """The number of the network's classes, and which of them each data set has: see `class_columns`.

    A checkpoint without names has those of the data set with the most classes. Raises UserError for a data set of which
    nothing says which classes it has.
    """
    own = names
    if names is None:
        largest = max(sets.values(), key=lambda val: val.num_classes)
        checkpoint, names, count = str(largest.path), largest.class_names, count or largest.num_classes
    classes = count or len(names or ())
    columns = {path: class_columns(checkpoint, names, path, val.class_names) for path, val in sets.items()}
    for path, val in sets.items():
        known = own is not None and own == val.class_names  # the network may have more classes than names
        if columns[path] is None and val.num_classes != classes and not known:
            raise UserError(
                f"{path} has {val.num_classes} classes, the network {classes}, and their names do not say which of "
                f"them: convert it with the names of the network's classes"
            )
    return classes, columns


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """What the evaluations of one checkpoint on several data sets share.

    probe    the converted images to train probes on
    trained  features and labels of the images to train probes on, by kind of weights, once they are computed
    """

    opened: "OpenedCheckpoint"
    recipe: Recipe
    world: "World"
    precision: "Precision"
    kernels: "Kernels"
    classes: int
    probe: Path | None
    say: Callable[[str], object]
    trained: "dict[str, tuple[Tensor, Tensor]]" = dataclasses.field(default_factory=dict)

    def on(
        self,
        val: Dataset,
        images: np.ndarray | None,
        columns: list[int] | None,
        probe_columns: list[int] | None,
        options: Options,
    ) -> dict[str, Any]:
        """Scores by kind of weights.

        The network chooses among its classes `columns`; the probes are trained on `probe_columns` (None: all).
        """
        from fastdeit.memory import moved
        from fastdeit.model.networks import OfClasses
        from fastdeit.pipelines.formats.checksums import unchecked
        from fastdeit.setup import open_evaluation_data
        from fastdeit.training.evaluation import evaluate

        world, say, kernels = self.world, self.say, self.kernels
        if columns is not None:
            say(f"{val.path} has {len(columns)} of the network's {self.classes} classes: the others are ignored")
        data = open_evaluation_data(self.recipe, val, world, self.precision, kernels, images=images, say=say)
        say(f"loader {data.loader.name}: {data.loader.reason}")
        say(f"images made on the {data.stage.name}: {data.stage.reason}")
        without = unchecked(val.path, val.checksums)
        if world.main and without is not None:
            console.say(without, "stderr")
        if self.probe is not None and images is None and world.main:
            trained = open_dataset(self.probe)
            trained.close()
            if same_images(trained, val):
                console.say(
                    f"warning: --probe {options.probe} has the images of {val.path}: the probes are scored on what "
                    f"they were trained on",
                    "stderr",
                )
        kinds: list[Literal["model", "ema"]] = ["model", "ema"] if options.weights == "both" else [options.weights]
        if options.weights == "both" and not self.opened.has_average:
            kinds = ["model"]
        scores: dict[str, Any] = {}
        try:
            for kind in kinds:
                fault = f"cannot be evaluated on {val.path}"
                network, messages = self.opened.network(self.classes, kind, kernels, fault)
                for message in messages:
                    say(message)
                model = network if columns is None else OfClasses(network, columns)
                moved(model, world.device)
                progress = world.main and not options.json
                # First the probe, which refuses several processes.
                probed = {}
                if self.probe is not None:
                    probed = self._probed(network, kind, data, self.probe, images, probe_columns, progress)
                own = evaluate(
                    model,
                    data,
                    world,
                    self.precision,
                    kernels=kernels,
                    progress=progress,
                    batch_option="--batch",
                    per_class=val.num_classes if options.per_class else 0,
                )
                scores[kind] = own | probed
                if "classes" in own:
                    own["classes"]["names"] = val.class_names
        finally:
            data.close()
        return scores

    def _probed(
        self,
        network: "DeiT | ConvnetStudent",
        kind: str,
        val: "EvaluationData",
        path: Path,
        images: np.ndarray | None,
        columns: list[int] | None,
        progress: bool,
    ) -> dict[str, Any]:
        """Scores of both classifiers on frozen features, trained on those of the images at `path`.

        images   indices of the images that the run held out; the classifiers are not trained on them. None: it held
                 out none
        columns  for each class of `val`, its index among the classes of the images at `path`; None: the same classes
        """
        from fastdeit.setup import open_evaluation_data
        from fastdeit.training.probes import features, of_classes, probe

        if kind not in self.trained:
            train, rest = open_dataset(path), None
            if images is not None and same_images(train, val.loader.dataset):
                rest = np.setdiff1d(np.arange(len(train)), images)
                self.say(f"--probe {path}: the images that the run held out are left out")
            shared = self.recipe, train, self.world, self.precision, self.kernels
            data = open_evaluation_data(*shared, images=rest, say=self.say)
            try:
                self.trained[kind] = features(network, data, self.world, self.precision, progress=progress)
            finally:
                data.close()
        others = features(network, val, self.world, self.precision, progress=progress)
        return probe(of_classes(*self.trained[kind], columns), others, val.loader.dataset.num_classes)


def _checked(
    options: Options, corrupted: Sequence[Path]
) -> tuple[dict[str, Dataset], Path | None, dict[str, list[int] | None]]:
    """Make the checks that need no PyTorch; return the data sets and the probe's, converted, and `probe_columns`.

    Raises UserError.
    """
    check_least(options, batch=1, threads=0)
    if options.per_class is not None and os.environ.get("RANK", "0") == "0":  # the main process writes it
        check_new_file(options.per_class)
    if options.recipe is not None:
        recipe_named(options.recipe)
        if options.arch is not None:
            raise UserError(f"--recipe {options.recipe} and --arch {options.arch} exclude each other: leave one out")
    check_checkpoint(checkpoint_file(options.checkpoint))
    paths = [*options.val, *corrupted]
    whole = [os.path.realpath(path) for path in paths]  # unlike Path.resolve, it takes a loop of links
    repeated = next((path for path, own in zip(paths, whole, strict=True) if whole.count(own) > 1), None)
    if repeated is not None:
        raise UserError(f"{repeated} is named twice: name each data set once")
    sets = {str(path): open_dataset(converted(path)) for path in paths}
    probe = options.probe and converted(options.probe)
    return sets, probe, probe_columns(probe, sets)


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
    heading = f"{'weights':8} {'head':20} {'top-1 %':>8} {'top-5 %':>8} {'loss':>8} {'ECE %':>8}"
    lines = [heading + f" {'ReaL %':>8}" * real]
    for kind, scores in results.items():
        for head, values in scores.items():
            if isinstance(values, dict):
                loss = f"{values['loss']:8.4f} {values['ece']:8.2f}" if "loss" in values else ""
                line = f"{kind:8} {head:20} {values['top1']:8.2f} {values['top5']:8.2f} {loss}".rstrip()
                lines.append(line + (f" {values['real']:8.2f}" if "real" in values else ""))
        if real:
            lines.append(f"{kind}: ReaL over the {scores['real_images']} of {scores['images']} images with such labels")
        if "fallbacks" in scores:
            lines.append(f"{kind}: PIL read {scores['fallbacks']} images that the loader's decoder refused")
        if "replaced" in scores:
            lines.append(f"{kind}: held-out images replaced because they do not decode: {scores['replaced']}")
    return "\n".join(lines)


def tables(results: dict[str, dict[str, Any]]) -> str:
    """The table of each data set; with several, its path above it."""
    if len(results) == 1:
        return table(next(iter(results.values())))
    return "\n\n".join(f"{printable(path)}\n{table(scores)}" for path, scores in results.items())


def _as_json(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """With one data set its scores, otherwise the scores by data set."""
    return next(iter(results.values())) if len(results) == 1 else results


def main() -> None:
    def go() -> None:
        options = parse(Options, program("eval"))
        keep_streams()
        launch.prepare()
        # Looked up once: hours later, the folder may have changed.
        named: Sets = {} if options.corruptions is None else corrupted_sets(options.corruptions)
        corrupted = [path for each in named.values() for path in each]
        results = evaluate_checkpoint(options, corrupted)
        if results:
            classes = {
                path: {kind: scores.pop("classes", {}) for kind, scores in kinds.items()}
                for path, kinds in results.items()
            }
            found = corruption_errors(results, named) if named else {}
            try:
                if options.json:
                    answer(json.dumps({"data": results, "corruptions": found} if found else _as_json(results)))
                else:
                    apart = {*map(str, corrupted)}
                    others = {path: scores for path, scores in results.items() if path not in apart}
                    answer("\n\n".join(filter(None, [tables(others), corruption_table(found) if found else ""])))
            finally:  # write the CSV even if printing fails
                if options.per_class is not None:
                    write_classes(options.per_class, classes)

    run(go)


if __name__ == "__main__":
    main()
