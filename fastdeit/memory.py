"""Running out of memory, of a GPU or of the machine: an error with a remedy in place of PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastdeit.config import Recipe
from fastdeit.pipelines.machine import MachineError

Network = TypeVar("Network", bound=nn.Module)

_GIB = 2**30
_OTHERS = 1.5 * _GIB  # what other programs hold is named from here on; less may be this process's own CUDA context
# How PyTorch says it of the host's memory; and the CUDA runtime, cuBLAS and cuDNN of a GPU's, which for PyTorch is
# `torch.OutOfMemoryError`.
_HOST = "can't allocate memory"
_GPU = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")


@contextmanager
def enough_memory(work: str, remedy: str, device: torch.device) -> Iterator[None]:
    """Raise MachineError if PyTorch runs out of memory in this block.

    work    what the block does, as the start of the sentence
    remedy  its end
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(said in str(error) for said in (_HOST, *_GPU)):
            raise
        host = device.type != "cuda" or _HOST in str(error)
        full = "the machine's memory is full" if host else _full(device)
        raise MachineError(f"{work}: {full}: {remedy}") from error


def moved(network: Network, device: torch.device) -> Network:
    """Move the network to the device, and return it. Raises MachineError if the device has too little memory."""
    remedy = "end the other programs there, or use another device"
    with enough_memory("moving the network's weights", remedy, device):
        return network.to(device)


def _full(device: torch.device) -> str:
    """That a GPU is full, and of what."""
    name = f"GPU {device.index or 0} is full"
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:  # the GPU answers no more
        return name
    ours = torch.cuda.memory_reserved(device)
    others = total - free - ours
    rest = f" and other programs {others / _GIB:.1f}" if others > _OTHERS else ""
    return f"{name}, {ours / _GIB:.1f} GiB of its {total / _GIB:.1f} are this process's{rest}"


def enough_to_train(recipe: Recipe, processes: int, device: torch.device) -> AbstractContextManager[None]:
    """`enough_memory` for the training of a resolved recipe."""
    share = recipe.run.global_batch // processes
    images = min(recipe.run.micro_batch or share, share)
    # `model.drop_path_mode` "skip" needs whole mixing groups.
    least = recipe.mixing_group(processes) if recipe.model.drop_path_mode == "skip" else 1
    cfg = recipe.model
    other = "" if cfg.arch != "deit" or cfg.grad_checkpointing else ", or --model.grad_checkpointing True"
    return _enough("training with", images, cfg.img_size, "--run.micro_batch", device, least, other)


def enough_for(work: str, images: Tensor, option: str, device: torch.device) -> AbstractContextManager[None]:
    """`enough_memory` for a batch (B, 3, S, S) on `device`; `option` sets its size, `work` says what it is for."""
    return _enough(work, len(images), images.shape[-1], option, device)


def _enough(
    work: str, images: int, size: int, option: str, device: torch.device, least: int = 1, other: str = ""
) -> AbstractContextManager[None]:
    fewer = images // 2 // least * least
    remedy = f"set {option} {fewer} or less" if fewer else "take a smaller model or smaller images"
    remedy += other
    return enough_memory(f"{work} {images} images of {size} x {size} at once", remedy, device)
