"""The forms of the training and inference step that `throughput` compares."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastdeit.config import Recipe
from fastdeit.distributed import World
from fastdeit.precision import Precision
from fastdeit.training.graphs import why_not


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """One comparison. `recipe` is resolved; it gives model, optimizer and objective."""

    recipe: Recipe
    mode: Literal["train", "infer"]
    batch: int
    ema: bool
    precision: Precision

    @property
    def device(self) -> torch.device:
        return self.precision.device

    @property
    def world(self) -> World:
        return World(0, 1, 1, self.device)

    def describe(self) -> dict[str, Any]:
        """The fields that identify this case, for JSON."""
        residual = ", bf16 residual" if self.recipe.model.residual_dtype == "bfloat16" else ""
        return {
            "model": self.recipe.name.removesuffix("_384"),
            "img_size": self.recipe.model.img_size,
            "mode": self.mode,
            "batch": self.batch,
            "ema": self.ema,
            "precision": self.precision.name + residual,
            "device": self.device.type,
        }


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to do a case's step.

    kernels  Triton kernels in place of PyTorch's operations, where the recipe's `model.kernels` says so
    skip     drop a fixed number of every 64 samples, and do not compute them
    tuning   mode of torch.compile; "": its default. Both modes record PyTorch's own CUDA graphs, which end at a
             network's border, unless `graph` is set too
    sdpa     the backend of PyTorch's attention; "": PyTorch chooses
    graph    replay the whole training step as one CUDA graph
    apex     AdamW by apex's FusedAdam
    """

    library: Literal["timm", "fastdeit"]
    compiled: bool = False
    kernels: bool = False
    skip: bool = False
    tuning: Literal["", "reduce-overhead", "max-autotune"] = ""
    sdpa: Literal["", "cudnn", "flash"] = ""
    graph: bool = False
    apex: bool = False

    @property
    def name(self) -> str:
        values = {
            "kernels": self.kernels,
            "skip": self.skip,
            self.tuning: self.tuning,
            self.sdpa: self.sdpa,
            "graph": self.graph,
            "apex": self.apex,
        }
        options = [name for name, value in values.items() if value]
        return f"{self.library} {' + '.join(['compiled' if self.compiled else 'eager', *options])}"

    @property
    def mode(self) -> str | None:
        """The `mode` of torch.compile."""
        if self.tuning == "max-autotune" and self.graph:
            return "max-autotune-no-cudagraphs"
        return self.tuning or None


def forms(case: ModelCase, *, peer: bool, compiled: bool, quick: bool) -> list[Form]:
    """The forms to compare, from plain to fully optimised.

    If `quick`, only our last form, with and without apex, and those of timm's that compile in seconds and are likely to
    be the fastest: "reduce-overhead", and the step as one graph.

    peer      include timm's forms
    compiled  include compiled forms
    """
    plain = [False, True] if compiled else [False]
    cuda, train = case.device.type == "cuda", case.mode == "train"
    theirs = [Form(library="timm", compiled=compiled) for compiled in plain] if peer else []
    if theirs and cuda:
        theirs += _timm_on_gpu(theirs[-1], train)
    ours = [Form(library="fastdeit", compiled=compiled) for compiled in plain]
    replace = dataclasses.replace
    if cuda:
        ours.append(replace(ours[-1], kernels=True))
    if train and case.recipe.model.drop_path > 0:
        ours.insert(-1, replace(ours[-1], skip=True))
    if train and why_not(case.recipe, case.world, case.precision) is None:
        ours += [replace(form, graph=True) for form in ours if form.compiled == compiled]
        ours.sort(key=lambda form: form.graph and not form.skip)  # the last form must draw as timm's does
        if importlib.util.find_spec("apex") is not None:
            ours.append(replace(ours[-1], apex=True))
    elif not train and compiled and cuda:
        ours.append(replace(ours[-1], tuning="reduce-overhead"))
    if not quick:
        return [*theirs, *ours]
    best = replace(ours[-1], apex=False)
    likely = [form for form in theirs if form.compiled == compiled and not form.sdpa and form.tuning != "max-autotune"]
    if cuda and compiled:
        likely = [form for form in likely if form.tuning or form.graph]
    return [*likely, *(form for form in ours if replace(form, apex=False) == best)]


def _timm_on_gpu(plain: Form, train: bool) -> list[Form]:
    """What may be faster than `plain` on a GPU."""
    replace = dataclasses.replace
    tuned: list[Form] = []
    if plain.compiled:
        tuned = [replace(plain, tuning="reduce-overhead"), replace(plain, tuning="max-autotune")]
    if train:
        replayed = replace(plain, graph=True)
        tuned += [replayed, *(replace(form, graph=True) for form in tuned if form.tuning == "max-autotune")]
    else:
        replayed = tuned[0] if tuned else plain
    return [*tuned, replace(replayed, sdpa="cudnn"), replace(replayed, sdpa="flash")]
