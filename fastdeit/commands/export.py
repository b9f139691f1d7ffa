"""`fastdeit export`: a checkpoint in the layouts of timm, transformers, ONNX and torch.export."""

import dataclasses
import errno
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastdeit.cli import parse, program, run
from fastdeit.inputs import check_checkpoint, checkpoint_file
from fastdeit.launch import announce_start
from fastdeit.pipelines.console import say
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.machine import check_space
from fastdeit.pipelines.parsing import parse_json
from fastdeit.streams import keep_streams

_OVERHEAD = 4 << 20  # bytes that a layout may need besides the weights
_MOST = 256 << 20  # bytes of a log that is searched for scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Write a checkpoint for other programs, each layout in a folder of its own below DEST.

    timm          timm.create_model("local-dir:DEST/timm", pretrained=True)
    transformers  AutoModelForImageClassification.from_pretrained("DEST/transformers")
    onnx          DEST/onnx/model.onnx, any batch size; needs pip install 'fastdeit[onnx]'
    torch         DEST/torch/model.pt2, for torch.export.load

    Each folder also holds the preprocessing, the class names and a model card. What was written is loaded again and
    compared with the model, except for transformers. A folder that is there already is an error.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]  # checkpoint of fastdeit, DeiT or timm, or a run's folder
    dest: Annotated[Path, tyro.conf.Positional]  # folder to make, or one that lacks the layouts' folders
    formats: tuple[Literal["timm", "transformers", "onnx", "torch"], ...] = ("timm",)
    recipe: str | None = None  # needed if the checkpoint does not hold its own, e.g. deit_small_distilled
    weights: Literal["auto", "model", "ema"] = "auto"  # auto: ema if the checkpoint has it
    img_size: int | None = None  # resolution, if it is not the recipe's; the position embedding is resized


def export(options: Options) -> None:
    """Write all layouts; raises UserError if one cannot be written."""
    path = checkpoint_file(options.checkpoint)
    check_checkpoint(path)
    formats = dict.fromkeys(options.formats)  # each once, in order
    if not formats:
        raise UserError("--formats names no layout: give timm, transformers, onnx or torch")
    for name in formats:
        if os.path.lexists(options.dest / name):
            raise UserError(f"{options.dest / name}: is there already: remove it, or name another folder")
    # Imported here: mistakes in the command are found without waiting for PyTorch.
    announce_start()
    from fastdeit.exporting import FORMATS, card
    from fastdeit.loading import load

    loaded = load(
        path,
        recipe=options.recipe,
        weights=options.weights,
        img_size=options.img_size,
    )
    known = stored_scores(path, loaded.weights) if options.img_size is None else None
    text = card(loaded, path.name, known)
    options.dest.mkdir(parents=True, exist_ok=True)
    # The libraries that write have errors of their own for a full disk.
    weights = sum(each.numel() * each.element_size() for each in loaded.model.state_dict().values())
    check_space(options.dest, len(formats) * (weights + _OVERHEAD), "the export", "DEST")
    for name in formats:
        # Nothing has its final name before it is complete and compared.
        with tempfile.TemporaryDirectory(prefix=".export-", dir=options.dest) as around:
            folder = Path(around, name)
            folder.mkdir()
            FORMATS[name](loaded, folder)
            (folder / "README.md").write_text(text)
            try:
                folder.rename(options.dest / name)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                raise UserError(
                    f"{options.dest / name} has been written by another program since this export began: name another "
                    f"DEST"
                ) from error
        say(f"{options.dest / name}: weights '{loaded.weights}' of {path}")


def stored_scores(path: Path, weights: str) -> dict[str, dict[str, float]] | None:
    """The scores of a run's checkpoint by head, as the run's log has them; None if it has none."""
    log = path.resolve().parent.parent / "log.jsonl"
    step = path.resolve().stem.rpartition("-")[2]
    if not step.isdecimal() or not log.is_file() or log.stat().st_size > _MOST:
        return None
    found: dict[str, Any] | None = None
    for line in log.read_bytes().splitlines():
        try:
            event = parse_json(line)
            if event["event"] == "eval" and event["global_step"] == int(step) and event["weights"] == weights:
                found = event
        except (ValueError, KeyError, TypeError):  # not ours
            continue
    if found is None:
        return None
    return {
        name: value for name, value in found.items() if isinstance(value, dict) and {"top1", "top5"} <= value.keys()
    }


def main() -> None:
    def go() -> None:
        options = parse(Options, program("export"))
        keep_streams()
        export(options)

    run(go)


if __name__ == "__main__":
    main()
