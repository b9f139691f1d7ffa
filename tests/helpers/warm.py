"""The compiled code of the pipelines: `python -m tests.helpers.warm` fills numba's cache, and importing this loads it.

Compiling takes half a minute, and processes that start together would all compile. Even from the cache, each process
would load the code again, unless it is forked from one that has loaded it.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from numba.core.dispatcher import Dispatcher
from PIL import Image

from fastdeit.data import TrainingData
from fastdeit.distributed import world
from fastdeit.inputs import open_dataset
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.recipes import deit_tiny_distilled
from tests.helpers.runs import changed


def load():
    """Load all that the cache holds into this process."""
    for name, module in list(sys.modules.items()):
        if not name.startswith("fastdeit.pipelines."):
            continue
        for value in list(vars(module).values()):
            if isinstance(value, Dispatcher) and hasattr(value._cache, "_cache_file"):
                for signature, *_ in value._cache._cache_file._load_index():
                    value.compile(signature)


def fill():
    """Have a batch made, which compiles what the cache lacks."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        for i in range(16):
            (path / "images" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
            picture = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(picture).save(path / "images" / f"{i % 2}" / f"{i}.jpg")
        convert(str(path / "images"), path / "x.beton", progress=False, workers=0)
        recipe = changed(
            deit_tiny_distilled(),
            data={"train": path / "x.beton", "loader": "torch", "threads": 1},
            run={"global_batch": 16, "device": "cpu", "epochs": 1},
            departures={"mix_group": 8},
        ).resolved()
        with world("cpu") as joined:
            data = TrainingData(recipe, open_dataset(path / "x.beton", "data.train"), joined)
            with data.batches() as batches:
                for _ in batches:
                    pass
            data.close()


if __name__ == "__main__":
    fill()
else:
    load()
