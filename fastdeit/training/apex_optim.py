"""NVIDIA apex's fused AdamW and LAMB, and their state in the form of PyTorch's AdamW and of timm's LAMB."""

import importlib.util
from typing import Any

import torch

from fastdeit.pipelines.errors import UserError, fact
from fastdeit.sections import OptimConfig

DEVICE = "cuda"  # the only device that its kernels run on
_BUILD = "build it from https://github.com/NVIDIA/apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or set"
_OTHER = "--optim.implementation torch"


def _fused(name: str) -> Any:
    try:
        from apex.optimizers import FusedAdam, FusedLAMB
    except (ImportError, SyntaxError) as error:
        spec = importlib.util.find_spec("apex")
        if spec is None:
            raise UserError(f"NVIDIA's apex is not installed: {_BUILD} {_OTHER}") from error
        where = spec.origin or next(iter(spec.submodule_search_locations or ()), "?")
        raise UserError(
            f"the apex in {where} is not NVIDIA's, or is incomplete ({fact(error)}). PyPI's apex is another project: "
            f"pip uninstall apex, then {_BUILD} {_OTHER}"
        ) from error
    return FusedLAMB if name == "lamb" else FusedAdam


def build_apex(groups: list[dict[str, Any]], cfg: OptimConfig, *, capturable: bool) -> torch.optim.Optimizer:
    """FusedAdam in AdamW's form, or FusedLAMB, over `groups`, as `optim.parameter_groups` returns them.

    capturable  keeps FusedAdam's learning rate and step count in tensors on the device, so that a CUDA graph can hold
                the update; FusedLAMB has no such form

    Raises UserError if apex is missing, is PyPI's project of that name, or was built without CUDA kernels, and for
    parameters that are not on a GPU.
    """
    kind = _fused(cfg.name)
    device = groups[0]["params"][0].device
    if device.type != DEVICE:
        raise UserError(f"apex's {kind.__name__} runs on a GPU, but the weights are on {device}: set {_OTHER}")
    options: dict[str, Any] = {"lr": cfg.lr, "adam_w_mode": True}
    options |= {name: value for name, value in (("betas", cfg.betas), ("eps", cfg.eps)) if value is not None}
    if cfg.name == "adamw":
        options["capturable"] = capturable
    try:
        return kind(groups, **options)
    except RuntimeError as error:
        raise UserError(f"apex cannot be used ({fact(error)}): {_BUILD} {_OTHER}") from error


def is_apex(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `build_apex` made the optimizer."""
    return type(optimizer).__name__ in ("FusedAdam", "FusedLAMB")


def _counts_in_groups(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the stored form, like apex's, counts steps in each group: timm's LAMB does, AdamW does not."""
    return type(optimizer).__name__ == "FusedLAMB"


def to_torch(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An apex optimizer's state dict as that of AdamW or of timm's LAMB."""
    if _counts_in_groups(optimizer):
        groups = [
            {**group, **{name: torch.tensor(float(group[name])) for name in ("step",) if name in group}}
            for group in state["param_groups"]
        ]
        return {**state, "param_groups": groups}
    states = {name: dict(value) for name, value in state["state"].items()}
    groups = [dict(group) for group in state["param_groups"]]
    for group in groups:
        count = group.pop("step", None)
        for name in group["params"]:
            if name in states and count is not None:
                states[name]["step"] = torch.tensor(float(count))
    return {"state": states, "param_groups": groups}


def to_apex(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, *, capturable: bool, device: torch.device
) -> dict[str, Any]:
    """The inverse of `to_torch`. Raises UserError if the parameters of a group differ in their step counts."""
    if _counts_in_groups(optimizer):
        groups = [
            {**group, **{name: int(group[name]) for name in ("step",) if name in group}}
            for group in state["param_groups"]
        ]
        return {**state, "param_groups": groups}
    states = {name: {k: v for k, v in value.items() if k != "step"} for name, value in state["state"].items()}
    groups = [dict(group) for group in state["param_groups"]]
    for group in groups:
        counts = {int(state["state"][name]["step"]) for name in group["params"] if name in states}
        if len(counts) > 1:
            raise UserError(
                f"the checkpoint's parameters took {min(counts)} to {max(counts)} steps, but apex's FusedAdam keeps "
                f"one count for all: set {_OTHER}"
            )
        for count in counts:
            group["step"] = torch.tensor([count], dtype=torch.int, device=device) if capturable else count
    return {"state": states, "param_groups": groups}
