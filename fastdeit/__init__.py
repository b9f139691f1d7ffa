"""Train Data-efficient image Transformers fast, exactly, and within a budget."""

from pathlib import Path

__version__ = "0.1.0"

# Installed, kernels/ and pipelines/ lie inside this folder; in a checkout beside it, which then needs no installation.
if not (Path(__file__).parent / "kernels").exists():
    __path__.append(str(Path(__file__).parents[1]))
