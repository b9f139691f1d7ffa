"""Checks of the images that `fastdeit eval --probe` trains on. Imports no PyTorch."""

from pathlib import Path

import numpy as np

from fastdeit.inputs import class_columns, open_dataset
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.dataset import Dataset


def same_images(one: Dataset, other: Dataset) -> bool:
    """Whether two data sets hold the same images."""
    return one.content_hash is not None and one.content_hash == other.content_hash


def probe_columns(path: Path | None, sets: dict[str, Dataset]) -> dict[str, list[int] | None]:
    """For each data set, the indices of its classes among those of the probe's training images; None: the same.

    Raises UserError if a data set has classes that the training images lack, or none of their images has its classes.
    """
    if path is None:
        return dict.fromkeys(sets)
    train = open_dataset(path, "--probe")
    train.close()
    names, classes = train.class_names, train.num_classes
    columns = {name: class_columns(str(path), names, name, val.class_names) for name, val in sets.items()}
    for name, val in sets.items():
        if columns[name] is None and classes != val.num_classes:
            raise UserError(
                f"{path} has {classes} classes, {name} {val.num_classes}, and at least one of them has no class "
                f"names: convert both with the same --class-names"
            )
        wanted = columns[name]
        if not (np.isin(train.label, wanted).any() if wanted else len(train)):
            raise UserError(f"{path} has no images of the classes of {name}: name other images to train the probe on")
    return columns
