"""Load weights from a file into a network: known layouts, and adaptations to the network.

Files are untrusted: only tensors and plain containers are read from a pickle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from fastdeit.checkpoint import read_checkpoint
from fastdeit.model.deit import DeiT
from fastdeit.model.networks import ConvnetStudent, build_network
from fastdeit.pipelines.errors import UserError
from fastdeit.sections import ModelConfig

State = dict[str, Tensor]
T = TypeVar("T")

_MODEL_KEYS = ("model", "state_dict")
_EMA_KEYS = ("ema", "model_ema", "state_dict_ema")
_LARGEST_PATCH = 64  # side in pixels of the largest patch to resample
_GAMMA = re.compile(r"^(blocks\.\d+\.)gamma_([12])$")
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile


def state_dict(stored: dict[str, Any], *, ema: bool = False, source: str = "the checkpoint") -> State:
    """The parameters in `stored`, without the prefixes of wrappers.

    Layouts: a state dict; {"model": ...} (released DeiT, fastdeit); {"state_dict": ...} (timm). With `ema` the average
    of the weights instead: {"ema": ...} (fastdeit), {"model_ema": ...} (released DeiT), {"state_dict_ema": ...}
    (timm). Raises UserError naming `source` if it has no such entry, or if the entry does not map names to tensors.
    """
    chosen = next((stored[k] for k in (_EMA_KEYS if ema else _MODEL_KEYS) if stored.get(k) is not None), None)
    if chosen is None:
        if ema or any(k in stored for k in (*_MODEL_KEYS, *_EMA_KEYS)):
            wanted, other = ("no averaged weights", "model") if ema else ("only averaged weights", "ema")
            raise UserError(f"{source} holds {wanted}: ask for the weights '{other}' instead")
        chosen = stored
    if not isinstance(chosen, dict) or not chosen:
        raise UserError(f"{source} holds a {type(chosen).__name__} without tensors where a state dict should be")
    wrong = [str(k) for k, v in chosen.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if wrong:
        raise UserError(f"{source} is not a state dict: no tensor under {_some(wrong)}. Save model.state_dict()")
    out: State = dict(chosen)
    while prefix := next((p for p in _WRAPPERS if all(name.startswith(p) for name in out)), None):
        out = {name.removeprefix(prefix): value for name, value in out.items()}
    return out


def describe(stored: dict[str, Any], source: str) -> dict[str, Any]:
    """The fields of a checkpoint that describe its network, checked: the file is untrusted."""

    def whole(value: Any) -> bool:
        return type(value) is int and 1 <= value <= 100_000

    def triple(value: Any) -> bool:
        plain = isinstance(value, list | tuple) and len(value) == 3
        return plain and all(isinstance(v, int | float) and math.isfinite(v) for v in value)

    checks = {
        "arch": lambda v: isinstance(v, str),
        "num_classes": whole,
        "img_size": whole,
        "mean": triple,
        "std": lambda v: triple(v) and min(v) > 0,
        "class_names": lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
    }
    out = {name: stored[name] for name in checks if stored.get(name) is not None}
    for name, value in out.items():
        if not checks[name](value):
            raise UserError(f"{source}: its field '{name}' is {str(value)[:80]!r}, which does not describe a network")
    return out


def load_weights(
    model: nn.Module,
    path_or_dict: Path | str | dict[str, Any],
    *,
    ema: bool = False,
    class_names: Sequence[str] | None = None,
) -> list[str]:
    """Load weights into a network; returns a sentence for each adaptation, for the caller to log.

    class_names  the network's classes; a sentence says if the checkpoint's head was trained for others

    In every network, a head with another number of classes keeps its fresh weights. In a DeiT also:
    - a patch projection with another patch size is resampled (timm's `resample_patch_embed`);
    - a position embedding with another grid is resized, bicubic with antialias (timm's `resample_abs_pos_embed`);
    - if only the model has a distillation token, token, position and head keep their fresh weights and start as in
      training from scratch;
    - if only the checkpoint has a distillation token, token, position and head are left out.

    A sentence says "reset" if fresh weights remain that make the network unfit for evaluation. Everything else is
    strict: raises UserError naming keys that are missing, unexpected or of another shape, and leaves the model
    unchanged.
    """
    if isinstance(path_or_dict, dict):
        stored, source = path_or_dict, "the checkpoint"
    else:
        stored, source = read_checkpoint(path_or_dict), str(path_or_dict)
    state = state_dict(stored, ema=ema, source=source)
    network = model.network if isinstance(model, ConvnetStudent) else model
    fresh = network.state_dict()
    messages: list[str] = []
    if isinstance(network, DeiT):
        # The authors' DeiT III (arXiv 2204.07118) names the factors of LayerScale otherwise than timm does.
        state = {_GAMMA.sub(r"\1ls\2.gamma", name): value for name, value in state.items()}
        messages += _adapt_patches(state, fresh)
        messages += resize_positions(state, network, source)
        messages += _adapt_distillation(state, fresh)
    resets = _adapt_heads(state, fresh, head_names(network))
    messages += resets or _other_classes(stored, class_names)
    narrow = {str(v.dtype).removeprefix("torch.") for k, v in state.items() if k in fresh and v.dtype != fresh[k].dtype}
    if narrow:
        messages.append(f"weights stored as {', '.join(sorted(narrow))} are converted to the network's own format")
    load_strictly(network, state, source)
    return messages


def head_names(network: nn.Module) -> tuple[str, ...]:
    """Module names of the classifiers of a DeiT or of a timm model."""
    if isinstance(network, DeiT):
        return ("head", "head_dist") if network.distilled else ("head",)
    names = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def check_strictly(network: nn.Module, state: State, source: str) -> None:
    """Raise UserError naming keys that are missing, unexpected or of another shape, or have integers for floats."""
    own = network.state_dict()
    faults = [
        f"{what}: {_some(sorted(keys))}"
        for what, keys in (
            ("missing", own.keys() - state.keys()),
            ("unexpected", state.keys() - own.keys()),
            (
                "of another shape",
                [
                    f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
                    for k in own.keys() & state.keys()
                    if own[k].shape != state[k].shape
                ],
            ),
        )
        if keys
    ]
    if faults:
        # The one difference between DeiT's weights and DeiT III's that an option makes.
        scaled = [{name for name in names if name.endswith(("ls1.gamma", "ls2.gamma"))} for names in (own, state)]
        other = "" if bool(scaled[0]) == bool(scaled[1]) else f", or set --model.layer_scale {1e-4 if scaled[1] else 0}"
        fault = f"{source} does not fit this network: {'; '.join(faults)}"
        raise UserError(f"{fault}. Use the recipe it was trained with{other}")
    wrong = [name for name in own if own[name].is_floating_point() != state[name].is_floating_point()]
    if wrong:
        raise UserError(
            f"{source}: {wrong[0]} is {state[wrong[0]].dtype}, but this network has {own[wrong[0]].dtype} there"
        )


def load_strictly(network: nn.Module, state: State, source: str) -> None:
    """Load a state dict that must fit without adaptation; raises UserError naming the keys that do not."""
    check_strictly(network, state, source)
    network.load_state_dict(state, strict=True)


def check_described(cfg: ModelConfig, num_classes: int | None, state: State, source: str) -> None:
    """Raise UserError unless a checkpoint's own recipe describes the network of its weights.

    Call it before building that network: an untrusted file may name any size.
    """
    head = state.get("head.weight")
    classes = num_classes or (max(1, len(head)) if head is not None and head.ndim else 1)
    blocks = len({name.split(".")[1] for name in state if name.startswith("blocks.") and name.count(".") > 1})
    edited = "the file was changed after it was written: name its recipe with --recipe"
    if cfg.arch == "deit" and cfg.depth != blocks:
        raise UserError(
            f"{source}: its recipe says model.depth {cfg.depth}, but its weights have {blocks} blocks; {edited}"
        )
    fault = f"{source}: its recipe does not describe a network; {edited}"
    network = on_meta(lambda: build_network(cfg, classes), fault)
    if network is None and cfg.arch == "deit":
        raise UserError(fault)
    if network is not None:
        inner = network.network if isinstance(network, ConvnetStudent) else network
        check_strictly(inner, state, f"{source}, with its own recipe,")


def on_meta(build: Callable[[], T], fault: str) -> T | None:
    """Build a network on the meta device, without memory for its weights; None if it cannot be built there.

    Raises UserError with `fault` for absurd shapes.
    """
    try:
        with torch.device("meta"):
            return build()
    except (ArithmeticError, ValueError, RuntimeError, TypeError) as error:
        if isinstance(error, (RuntimeError, TypeError)) and "overflow" not in str(error).lower():
            return None  # some of timm's networks need real values in their constructor
        raise UserError(f"{fault} ({str(error).splitlines()[0]})") from error


def _some(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(name[:80] for name in names[:limit]) + more


def _adapt_heads(state: State, fresh: State, heads: tuple[str, ...]) -> list[str]:
    messages = []
    for head in heads:
        weight = state.get(f"{head}.weight")
        if weight is None or weight.ndim == 0 or f"{head}.weight" not in fresh:
            continue
        classes = len(fresh[f"{head}.weight"])
        if len(weight) != classes:
            for name in (f"{head}.weight", f"{head}.bias"):
                state[name] = fresh[name]
            messages.append(f"{head} reset: the checkpoint has {len(weight)} classes, this model {classes}")
    return messages


def _other_classes(stored: dict[str, Any], names: Sequence[str] | None) -> list[str]:
    """A sentence if the checkpoint has as many classes as `names`, but with other names, or in another order."""
    before = stored.get("class_names")
    if not isinstance(before, list) or names is None or len(before) != len(names):
        return []
    at = next((i for i, (a, b) in enumerate(zip(before, names, strict=True)) if a != b), None)
    if at is None:
        return []
    return [
        f"the head keeps its weights, but its classes or their order differ: class {at} is '{before[at]!s:.80}' in the "
        f"checkpoint, '{names[at]}' here"
    ]


def _adapt_patches(state: State, fresh: State) -> list[str]:
    name = "patch_embed.proj.weight"
    old, new = state.get(name), fresh[name]
    if old is None or old.ndim != 4 or old.shape[:2] != new.shape[:2] or old.shape == new.shape:
        return []
    if max(old.shape[2:]) > _LARGEST_PATCH:  # resampling memory grows with its fourth power
        return []
    state[name] = resample_patch_embed(old, list(new.shape[2:]))
    return [f"patch projection resampled from {tuple(old.shape[2:])} to {tuple(new.shape[2:])} pixels"]


def resize_positions(state: State, model: DeiT, source: str) -> list[str]:
    """Resize the position embedding in `state` to the grid of `model`, as timm does; a sentence if it had another."""
    positions = state.get("pos_embed")
    if positions is None or positions.ndim != 3 or positions.shape[2] != model.pos_embed.shape[2]:
        return []
    count = positions.shape[1]
    # No square is 1 or 2 more than another, so a square number of rows has none for tokens.
    prefix = 0 if count and math.isqrt(count) ** 2 == count else 2 if "dist_token" in state else 1
    side = math.isqrt(max(0, count - prefix))
    if side < 1 or side**2 != positions.shape[1] - prefix:
        raise UserError(
            f"{source}: pos_embed has {positions.shape[1]} rows, which is not {prefix} plus a square grid of patches"
        )
    grid = model.patch_embed.grid_size
    if (side, side) == grid:
        return []
    state["pos_embed"] = resample_abs_pos_embed(
        positions, new_size=list(grid), old_size=[side, side], num_prefix_tokens=prefix
    )
    return [f"position embedding resized from {side} x {side} to {grid[0]} x {grid[1]} patches"]


def _adapt_distillation(state: State, fresh: State) -> list[str]:
    has, wants = "dist_token" in state, "dist_token" in fresh
    if has == wants or "pos_embed" not in state:
        return []
    positions, extra = state["pos_embed"], ("dist_token", "head_dist.weight", "head_dist.bias")
    # Both have as many patches by now: without positions of tokens there is none to change.
    placed = positions.shape[1] != fresh["pos_embed"].shape[1]
    token = "distillation token, its position" if placed else "distillation token"
    if has:
        for name in extra:
            state.pop(name, None)
        if placed:
            state["pos_embed"] = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
        return [f"{token} and its head are left out: this model has none"]
    for name in extra:
        state[name] = fresh[name]
    own = fresh["pos_embed"][:, 1:2].to(positions)
    if placed and own.shape[2] == positions.shape[2]:
        state["pos_embed"] = torch.cat([positions[:, :1], own, positions[:, 1:]], dim=1)
    return [f"{token} and head_dist reset: the checkpoint has none"]
