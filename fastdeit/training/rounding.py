"""Device, threads and versions: they decide how a step rounds, as the number of processes does."""

from collections.abc import Mapping

import torch

from fastdeit.distributed import World
from fastdeit.training.run_record import version
from fastdeit.version import __version__

# Packages that compute the plan, the pixels and the model, and those that decode to certain pixels.
_PACKAGES = ("torch", "triton", "timm", "numpy", "numba", "pillow")
_DECODERS = {"ffcv": ("ffcv",), "nvjpeg": ("nvidia-dali-cuda120", "nvidia-dali-cuda130")}

Rounding = Mapping[str, str | int | None]


def rounding(world: World, pixels: object) -> dict[str, str | int | None]:
    """Device, threads and versions of this process.

    pixels  those that the loader decodes to: the versions of its libraries count if they decide the pixels

    device       the GPU's name; on a CPU, its instruction set
    CPU threads  number of PyTorch's threads, among which it divides sums; None on a GPU

    Every other key is a package with its version, None if it is not installed.
    """
    gpu, packages = world.device.type == "cuda", (*_PACKAGES, *_DECODERS.get(str(pixels), ()))
    device = torch.cuda.get_device_name(world.device) if gpu else f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": device,
        "CPU threads": None if gpu else torch.get_num_threads(),
        "fastdeit": __version__,
        **{name: version(name) for name in packages},
    }


def rounding_changes(before: Rounding, now: Rounding) -> list[str]:
    """A phrase for each key of `now` that had another value `before`."""
    changed = [name for name in now if name in before and before[name] != now[name]]
    if "device" in changed:  # the number of threads goes with it
        changed = [name for name in changed if None not in (before[name], now[name]) or name != "CPU threads"]
    return [f"{name} {_shown(before[name])} (now {_shown(now[name])})" for name in changed]


def _shown(value: str | int | None) -> str:
    return "missing" if value is None else str(value)
