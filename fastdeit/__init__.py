"""Train Data-efficient image Transformers fast, exactly, and within a budget."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdeit.version import __version__ as __version__

if TYPE_CHECKING:
    from fastdeit.loader import create_loader as create_loader
    from fastdeit.loading import load as load
    from fastdeit.model.fused import fuse as fuse
    from fastdeit.parts import create_model as create_model
    from fastdeit.parts import objective as objective
    from fastdeit.whole_run import Trainer as Trainer


# Installed, kernels/ and pipelines/ lie inside this folder; in a checkout beside it, which then needs no installation.
if not (Path(__file__).parent / "kernels").exists():
    __path__.append(str(Path(__file__).parents[1]))

# The Python interface; each name is imported when it is first used, since PyTorch takes seconds.
_PLACES = {
    "Trainer": "fastdeit.whole_run",
    "create_loader": "fastdeit.loader",
    "create_model": "fastdeit.parts",
    "fuse": "fastdeit.model.fused",
    "load": "fastdeit.loading",
    "objective": "fastdeit.parts",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]
