"""`fastdeit predict`: the most probable classes of images."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastdeit.cli import check_least, parse, program, run
from fastdeit.launch import announce_start
from fastdeit.pipelines.console import answer, say
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.sources.base import IMG_EXTENSIONS, is_image
from fastdeit.streams import keep_streams

BAD = 3  # exit status: some images could not be read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Print the most probable classes of images, one line for each.

    An image is decoded, turned upright, resized and cropped exactly as evaluation does it.

    Exit status: 0 all images were classified; 3 some could not be read; 2 an error.
    """

    model: Annotated[Path, tyro.conf.Positional]  # checkpoint of fastdeit, DeiT or timm, or a run's folder
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]  # files, folders, or - for a list on stdin, one a line
    topk: int = 5
    json: bool = False  # print one JSON object a line
    recipe: str | None = None  # needed if the checkpoint does not hold its own, e.g. deit_small_distilled
    weights: Literal["auto", "model", "ema"] = "auto"  # auto: ema if the checkpoint has it
    img_size: int | None = None  # resolution, if it is not the recipe's
    batch: int = 32
    workers: int = 4  # processes that read images, one a core at most; 0: none
    device: Literal["auto", "cpu", "cuda"] = "auto"


def images_of(paths: Iterable[Path]) -> list[Path]:
    """The image files that `paths` name: files, and all images in and below folders, sorted; "-" reads from stdin.

    Raises UserError for a path that is not there and a folder without images, OSError for a folder that cannot be read.
    """
    out: list[Path] = []
    for path in paths:
        if str(path) == "-":
            out += images_of(Path(line.rstrip("\n")) for line in sys.stdin if line.strip())
        elif path.is_dir():
            found = sorted(each for each in _below(path) if is_image(each.name) and each.is_file())
            if not found:
                raise UserError(f"{path}: no images in this folder ({', '.join(IMG_EXTENSIONS)}): name another")
            out += found
        elif path.exists():
            out.append(path)
        else:
            raise UserError(f"{path}: there is no such image or folder: check the path")
    return out


def _below(folder: Path) -> Iterator[Path]:
    """The files below a folder, also those that links lead to; a folder with several names counts once."""

    def refuse(error: OSError) -> None:
        raise error

    seen: set[tuple[int, int]] = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:  # a link may lead back
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield from (Path(root, name) for name in names)


def predict(options: Options) -> int:
    """Print the classes of all images; returns the exit status."""
    check_least(options, topk=1, batch=1, workers=0)
    paths = images_of(options.images)
    if not paths:
        raise UserError("no images: name files or folders, or give their paths on stdin")
    # Imported here: mistakes in the command are found without waiting for PyTorch.
    announce_start()
    import torch

    from fastdeit.distributed import world
    from fastdeit.image_files import read_batches
    from fastdeit.loading import load
    from fastdeit.memory import enough_for, moved
    from fastdeit.setup import set_up

    loaded = load(
        options.model,
        recipe=options.recipe,
        weights=options.weights,
        img_size=options.img_size,
    )
    with world(options.device) as joined:
        run = dataclasses.replace(loaded.recipe.run, precision="fp32")
        set_up(dataclasses.replace(loaded.recipe, run=run), joined)
        moved(loaded.model, joined.device)
        began, done, bad = time.monotonic(), 0, 0
        for files in read_batches(paths, loaded.transform, batch=options.batch, workers=options.workers):
            names, images = [], []
            for file in files:
                if file.image is None:
                    say(f"{file.fault}", "stderr")
                    bad += 1
                else:
                    names.append(str(file.path))
                    images.append(file.image)
            if names:
                batch = torch.stack(images)
                with enough_for("predicting", batch, "--batch", joined.device):
                    probabilities = loaded.probabilities(batch.to(joined.device)).cpu()
                _answer(names, probabilities, loaded.class_names, options)
                done += len(names)
        rate = done / max(time.monotonic() - began, 1e-9)
        by = f"the weights '{loaded.weights}' of {loaded.path} on {joined.device.type}"
        say(f"{done} images with {by}: {rate:.1f} im/s", "stderr")
    return BAD if bad else 0


def _answer(names: list[str], probabilities: Any, class_names: list[str] | None, options: Options) -> None:
    top = probabilities.topk(min(options.topk, probabilities.shape[1]))
    for name, values, labels in zip(names, top.values.tolist(), top.indices.tolist(), strict=True):
        called = [str(label) if class_names is None else class_names[label] for label in labels]
        if options.json:
            found = [
                {"label": label, "name": each, "probability": round(value, 6)}
                for label, each, value in zip(labels, called, values, strict=True)
            ]
            answer(json.dumps({"image": name, "classes": found}))
        else:
            shown = ", ".join(f"{each} {100 * value:.1f}%" for each, value in zip(called, values, strict=True))
            answer(f"{name}: {shown}")


def main() -> None:
    def go() -> int:
        options = parse(Options, program("predict"))
        keep_streams()
        return predict(options)

    sys.exit(run(go))


if __name__ == "__main__":
    main()
