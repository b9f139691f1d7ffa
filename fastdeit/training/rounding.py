"""What decides how a step rounds, besides the recipe: device, threads, versions."""

from collections.abc import Mapping

import torch

from fastdeit.distributed import World
from fastdeit.training.run_record import version
from fastdeit.version import __version__

# Packages that compute a step: the pixels, the plan, the model.
_PACKAGES = ("torch", "triton", "timm", "numpy", "numba", "pillow")

Rounding = Mapping[str, str | int | None]


def rounding(world: World) -> dict[str, str | int | None]:
    """Device, threads and versions of this process.

    device       the GPU's name; on a CPU, its instruction set
    CPU threads  of PyTorch, which divides its sums among them; None on a GPU

    Every other key is a package with its version, None if it is not installed.
    """
    gpu = world.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(world.device)
        if gpu
        else f"CPU, {torch.backends.cpu.get_cpu_capability()}",
        "CPU threads": None if gpu else torch.get_num_threads(),
        "fastdeit": __version__,
        **{name: version(name) for name in _PACKAGES},
    }


def rounding_changes(before: Rounding, now: Rounding) -> list[str]:
    """A phrase for each key of `now` that had another value `before`."""
    return [f"{name} {before[name]} (now {now[name]})" for name in now if name in before and before[name] != now[name]]
