"""`python -m benchmarks roof`: the time of a training step by part, predicted from its shapes; needs no GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.profiles import newest
from benchmarks.record import RESULTS
from benchmarks.roof.report import Forecast, gemm_table, part_table, summary_table
from benchmarks.tables import read
from benchmarks.throughput.report import is_ours
from fastdeit.budget.cards import find_card
from fastdeit.budget.step import predict
from fastdeit.budget.work import Inputs, gemms
from fastdeit.cli import parse, run
from fastdeit.recipes import RECIPES
from fastdeit.sections import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Options:
    """Predict the training step of DeiT models on GPUs, and compare with what was measured on them."""

    models: tuple[Literal["tiny", "small", "base"], ...] = ("tiny", "small", "base")
    card: tuple[str, ...] = ("H200",)  # of H200, H100, A100, B200, L40S, RTX4090
    batch: int = 256
    img_size: int = 224  # side of the square input, pixels
    distilled: bool = False  # with the distillation token
    residual: Literal["float32", "bfloat16"] = "float32"  # dtype of the residual stream
    skip: bool = False  # leave out the samples that stochastic depth drops (model.drop_path_mode "skip")
    inputs: Inputs = "images"  # float32 images, as in `throughput`; patches: as the device augmentation writes them
    ema: bool = False  # average the weights
    graph: bool = True  # the step as one CUDA graph; otherwise the host launches every kernel
    gemms: bool = False  # also print every GEMM
    results: Path = RESULTS  # folder with profiles.jsonl and throughput.jsonl, for comparison


def forecasts(options: Options) -> list[Forecast]:
    """A forecast for every model and card. Raises UserError for an unknown card or a batch below 1."""
    profiles, throughput = (read(options.results / f"{name}.jsonl") for name in ("profiles", "throughput"))
    comparable = options.inputs == "images" and options.graph and not options.skip
    precision = "bf16" if options.residual == "float32" else "bf16, bf16 residual"
    made = []
    for card in map(find_card, options.card):
        for model in options.models:
            name = _recipe(options, model)
            step = predict(
                _config(options, model),
                card,
                batch=options.batch,
                inputs=options.inputs,
                ema=options.ema,
                graph=options.graph,
            )
            case = {"model": name, "img_size": options.img_size, "batch": options.batch, "ema": options.ema}
            case |= {"mode": "train", "precision": precision, "card": card.name}
            profile, rate = None, None
            if comparable:
                profile, timed = newest(profiles, **case), newest(throughput, **case)
                sides = {} if timed is None else timed.get("sides", {})
                rates = [side["images_per_second"] for form, side in sides.items() if is_ours(form)]
                if timed is not None and rates:
                    rate = max(rates), str(timed["environment"]["commit"])[:7]
            made.append(Forecast(name, card, step, profile, rate))
    return made


def _recipe(options: Options, model: str) -> str:
    return f"deit_{model}{'_distilled' if options.distilled else ''}"


def _config(options: Options, model: str) -> ModelConfig:
    """Raises UserError for an image size that the recipe does not allow."""
    recipe = RECIPES[_recipe(options, model)]()
    changed: dict[str, Any] = {"img_size": options.img_size, "residual_dtype": options.residual}
    changed["drop_path_mode"] = "skip" if options.skip else "mask"
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **changed))
    return recipe.resolved().model


def show(options: Options) -> None:
    """Print the tables."""
    made = forecasts(options)
    tables = [part_table(forecast) for forecast in made]
    if options.gemms:
        for card in map(find_card, options.card):
            for model in options.models:
                shapes = gemms(_config(options, model), options.batch)
                tables.append(gemm_table(_recipe(options, model), shapes, card))
    print(*(table.text() + "\n" for table in (*tables, summary_table(made))), sep="\n")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    run(lambda: show(parse(Options, "python -m benchmarks roof", argv)))
