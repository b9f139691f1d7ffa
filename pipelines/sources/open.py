"""Opens the source that a text names."""

import os
import re
from pathlib import Path

from fastdeit.pipelines.formats.beton_layout import MAX_CLASSES
from fastdeit.pipelines.formats.shard_layout import NODES
from fastdeit.pipelines.sources import imagenet
from fastdeit.pipelines.sources.annotations import Annotations
from fastdeit.pipelines.sources.base import Source, SourceError, SplitNeededError, check_class_names
from fastdeit.pipelines.sources.cifar import Cifar
from fastdeit.pipelines.sources.files import is_folder, listing, open_regular, read_text
from fastdeit.pipelines.sources.folder import ImageFolder
from fastdeit.pipelines.sources.idx import Idx, is_idx, open_idx_folder
from fastdeit.pipelines.sources.joined import Joined
from fastdeit.pipelines.sources.parquet import Parquet
from fastdeit.pipelines.sources.patterns import matching_files
from fastdeit.pipelines.sources.torchvision import Torchvision
from fastdeit.pipelines.sources.webdataset import WebDataset

# The word before the colon, and the options after #: #name=value,name=value
_OPTIONS = {
    "torchvision": (),
    "imagenet": ("labels",),
    "imagenetv2": (),
    "webdataset": ("label",),
    "parquet": ("image", "label"),
    "cifar": (),
    "coco": (),
}


def read_class_names(path: Path) -> list[str]:
    """Class names in the order of the labels, one a line. Raises SourceError for a file without any."""
    names = read_text(path).splitlines()
    if len(names) > MAX_CLASSES:
        raise SourceError(f"{path}: {len(names)} lines, but at most {MAX_CLASSES} classes. Is it the right file?")
    while names and not names[-1].strip():
        names.pop()
    return check_class_names([name.strip() for name in names], str(path))


def open_source(text: str | os.PathLike[str], split: str | None = None, class_names: list[str] | None = None) -> Source:
    """Open the source that `text` names. Raises SourceError if there is none.

    FOLDER                           class folders, or with `split` FOLDER/split; IDX files, which need a split
    FILE                             IDX images file, its labels beside it
    torchvision:NAME:ROOT[:SPLIT]    class of torchvision.datasets and its root
    imagenet:PATH[:SPLIT]            ILSVRC2012's train or val tar, or their folder; val needs one of
                                     `imagenet.VAL_LABELS` beside it, or #labels=FILE
    imagenetv2:FILE                  an archive of ImageNet-V2
    webdataset:PATTERN               tar shards: file, folder, glob or train-{000..127}.tar; #label=KEY of a .json
    parquet:PATTERN                  parquet files, likewise; #image=COLUMN,label=COLUMN if they are ambiguous
    cifar:FILE[:SPLIT]               CIFAR-10's and CIFAR-100's own archives
    coco:FILE                        a JSON list in COCO format, such as iNaturalist's train2018.json

    The word before the colon is optional for files with their usual names, and for folders of such files.

    `split` may join several splits: "train+val".

    `class_names` sets the order of the labels of an image folder and of ILSVRC2012 (by wnid), and names the labels
    0, 1, ... of other sources.
    """
    text = os.fspath(text)
    if class_names is not None:
        check_class_names(class_names, "class names")
    if split is None and text.partition(":")[0] in ("torchvision", "imagenet", "cifar"):
        before, _, last = text.rpartition(":")
        if "+" in last and ":" in before and not os.path.lexists(last):
            text, split = before, last
    if split is not None and "+" in split and not is_folder(Path(text) / split):
        names = [os.path.normpath(name) if name else "" for name in split.split("+")]
        if not all(names) or len(set(names)) < len(names):
            raise SourceError(f"{text}: --split {split} must join different splits, such as train+val")
        return Joined([open_source(text, name, class_names) for name in names])
    form, colon, rest = text.partition(":")
    options: dict[str, str] = {}
    if colon and form in _OPTIONS:
        rest, options = _options(form, rest)
        if form in ("imagenet", "cifar"):
            rest, split = _with_split(text, rest, split)
        if not rest:
            raise SourceError(f"{text}: names no file or folder after the colon: give one")
    elif (recognised := _recognise(Path(text), split)) is None:
        return _open_plain(Path(text), split, class_names)
    else:
        form, rest = recognised, text
    match form:
        case "torchvision":
            name, _, root = rest.partition(":")
            if not root:
                raise SourceError(f"{text}: write torchvision:NAME:ROOT or torchvision:NAME:ROOT:SPLIT")
            return Torchvision(name, *_with_split(text, root, split), class_names)
        case "imagenet":
            return _open_imagenet(Path(rest), split, class_names, options.get("labels"))
        case "imagenetv2":
            if split is not None:
                raise SourceError(f"{text}: has no splits: leave out --split")
            return imagenet.ImageNetV2(_file(rest), class_names)
        case "webdataset":
            files, left_out = matching_files(rest, ".tar", split)
            return WebDataset(rest, files, class_names, options.get("label", "label"), left_out)
        case "parquet":
            files, left_out = matching_files(rest, ".parquet", split)
            return Parquet(rest, files, class_names, options.get("image"), options.get("label"), left_out)
        case "coco":
            if split is not None:
                raise SourceError(f"{text}: one list is one split: leave out --split")
            return Annotations(Path(rest), class_names)
        case _:
            return Cifar(_file(rest), split, class_names)


def _options(form: str, rest: str) -> tuple[str, dict[str, str]]:
    """Split a text into the part before `#` and the options after it."""
    if not _OPTIONS[form]:
        return rest, {}
    if os.path.lexists(rest):  # a path may contain a #
        return rest, {}
    rest, *more = re.split(r"#(?=\w*(?:=|$))", rest, maxsplit=1)
    options: dict[str, str] = {}
    for option in re.split(r",(?=\w*=)", more[0]) if more else ():
        name, _, value = option.partition("=")
        if name not in _OPTIONS[form] or not value:
            known = ",".join(f"{known}=..." for known in _OPTIONS[form])
            raise SourceError(f"{form}:{rest}: unknown option '{option}'; it understands #{known}")
        options[name] = value
    return rest, options


def _with_split(text: str, rest: str, split: str | None) -> tuple[str, str | None]:
    """Path and split of `PATH` or `PATH:SPLIT`, together with --split."""
    path, _, last = rest.partition(":")
    if last and split and last != split:
        raise SourceError(f"{text}: names the split '{last}', --split names '{split}'")
    return path, last or split


def _file(name: str) -> Path:
    path = Path(name)
    open_regular(path).close()
    return path


def _open_imagenet(path: Path, split: str | None, class_names: list[str] | None, labels: str | None) -> Source:
    if is_folder(path):
        tars = {"train": path / imagenet.TRAIN, "val": path / imagenet.VAL}
        there = [known for known, file in tars.items() if os.path.lexists(file)]
        if split is None and len(there) == 1:
            split = there[0]
        if split not in tars:
            found = ", ".join(tars[known].name for known in there) or "neither tar of ILSVRC2012"
            raise SplitNeededError(f"{path}: holds {found}: choose --split train or --split val")
        path = tars[split]
    elif split is not None and split != ("train" if "train" in path.name else "val"):
        raise SourceError(f"{path}: one file is one split: leave out --split, or name the folder")
    path = _file(str(path))
    if "train" in path.name:
        return imagenet.ImageNetTrain(path, class_names)
    return imagenet.ImageNetVal(path, class_names, None if labels is None else _file(labels))


def _recognise(path: Path, split: str | None) -> str | None:
    """The form of source that a file's name, or the names in a folder, indicate."""
    name = path.name
    if name in (imagenet.TRAIN, imagenet.VAL):
        return "imagenet"
    if name.startswith("imagenetv2-") and name.endswith((".tar.gz", ".tar")):
        return "imagenetv2"
    if name.startswith("cifar-") and name.endswith((".tar.gz", ".tar")):
        return "cifar"
    if name.endswith(".json"):
        return "coco"
    if not is_folder(path):
        return "parquet" if name.endswith(".parquet") else "webdataset" if name.endswith(".tar") else None
    if split is not None and is_folder(path / split):
        return _folder_form(path / split)
    if any(os.path.lexists(path / known) for known in (imagenet.TRAIN, imagenet.VAL)):
        return "imagenet"
    return _folder_form(path) or _folder_form(path / "data")


def _folder_form(folder: Path) -> str | None:
    """The form of the files in a folder; None for a folder with subfolders, which are classes."""
    if not is_folder(folder):
        return None
    inside = listing(folder)
    if not set(inside.folders) <= {"data", NODES}:
        return None
    for suffix, form in ((".parquet", "parquet"), (".tar", "webdataset")):
        if any(name.endswith(suffix) for name in inside.files):
            return form
    return None


def _open_plain(path: Path, split: str | None, class_names: list[str] | None) -> Source:
    if os.path.lexists(path) and not is_folder(path):
        open_regular(path).close()
        if not is_idx(path):
            raise SourceError(
                f"{path}: neither a folder nor a file whose name shows its format: put the format before it, "
                f"such as webdataset:{path}; IDX images are named ...images...idx3-ubyte[.gz]"
            )
        if split is not None:
            raise SourceError(f"{path}: one file is one split: leave out --split, or name the folder")
        return Idx(path, class_names)
    if is_folder(path) and any(is_idx(Path(name)) for name in listing(path).files):
        return open_idx_folder(path, split, class_names)
    folder = path / split if split else path
    if not is_folder(folder):
        raise SourceError(f"{folder}: there is no such folder or file: check the path")
    return ImageFolder(folder, class_names)
