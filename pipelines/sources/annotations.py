"""Images and classes from a JSON file in COCO format, such as the lists of iNaturalist 2017 to 2019."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fastdeit.pipelines.errors import fact
from fastdeit.pipelines.parsing import parse_json
from fastdeit.pipelines.sources.base import (
    SourceError,
    check_class_names,
    class_labels,
    is_image,
    read_image,
    shown,
)
from fastdeit.pipelines.sources.files import is_left_out, open_regular

MAX_LIST = 192 << 20  # bytes; iNaturalist 2018's training list takes 130 MB


class Annotations:
    """The images of a file with the lists `images`, `annotations` and `categories`.

    Image paths are relative to the file's folder. Labels number the categories in order of `id`. Categories without
    images count too, so train and val agree. With `class_names`, a label is the index of the category's name in that
    list. Categories that share a name get their supercategory, then their id, appended. Format:
    https://github.com/visipedia/inat_comp.

    Raises SourceError for a file in another format, an image with several categories, or an image listed twice.
    """

    in_memory = False

    def __init__(self, path: Path, class_names: list[str] | None = None) -> None:
        self.path = path
        lists = self._read()
        categories = sorted(lists["categories"], key=lambda each: self._number(each, "id"))
        if len({each["id"] for each in categories}) < len(categories):
            raise self._error("two categories have the same id")
        names = self._names(categories)
        place = class_labels(names, class_names or names, str(path))
        self.class_names = list(place)
        label = {each["id"]: place[name] for each, name in zip(categories, names, strict=True)}
        of_image: dict[int, int] = {}
        for each in lists["annotations"]:
            image, category = self._number(each, "image_id"), self._number(each, "category_id")
            if category not in label:
                raise self._error(f"image {image} has category {category}, which `categories` lacks")
            if of_image.setdefault(image, label[category]) != label[category]:
                raise self._error(f"image {image} has several categories: a list of objects, not of classified images")
        self._files: list[str] = []
        labels: list[int] = []
        self._left_out = Counter(files_that_are_no_images=0, hidden_files=0, images_without_category=0)
        seen: set[int | str] = set()
        for each in lists["images"]:
            name, image = self._file_name(each), self._number(each, "id")
            if name in seen or image in seen:
                raise self._error(f"image {image}, {shown(name)}, is listed twice")
            seen |= {name, image}
            number = of_image.get(image)
            if number is None:
                self._left_out["images_without_category"] += 1
            elif any(map(is_left_out, PurePosixPath(name).parts)):
                self._left_out["hidden_files"] += 1
            elif not is_image(name):
                self._left_out["files_that_are_no_images"] += 1
            else:
                self._files.append(name)
                labels.append(number)
        if not self._files:
            raise self._error("no usable image: all lack a category (a test list?), are hidden, or are not image files")
        self._labels = np.array(labels, np.int64)

    def _error(self, reason: str) -> SourceError:
        return SourceError(f"{self.path}: {reason}")

    def _read(self) -> dict[str, list[dict[str, Any]]]:
        with open_regular(self.path) as file:
            data = file.read(MAX_LIST + 1)
        if len(data) > MAX_LIST:
            raise self._error(
                f"larger than {MAX_LIST >> 20} MiB, too large for a list of images: convert folders of them instead"
            )
        names = ("images", "annotations", "categories")
        try:
            lists = parse_json(data, MAX_LIST)
        except ValueError as error:
            raise self._error(f"not a list of images in JSON ({fact(error)}). Fetch it again") from error
        for name in names:
            entries = lists.get(name) if isinstance(lists, dict) else None
            if not (isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
                raise self._error(f"has no list `{name}` of objects; a list in COCO's layout has {', '.join(names)}")
        return lists

    def _number(self, entry: dict[str, Any], name: str) -> int:
        value = entry.get(name)
        if type(value) is not int:
            raise self._error(f"an entry has {name} {shown(value)} instead of a number")
        return value

    def _file_name(self, entry: dict[str, Any]) -> str:
        name = entry.get("file_name")
        if not isinstance(name, str) or not name or "\0" in name or not _is_text(name):
            raise self._error(f"an image has file_name {shown(name)}")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise self._error(f"an image has file_name {shown(name)}, outside of the list's folder")
        return name

    def _names(self, categories: list[dict[str, Any]]) -> list[str]:
        for each in categories:
            name = each.get("name", "-")
            if not isinstance(name, str) or not name or not _is_text(name):
                raise self._error(f"category {each['id']} has name {shown(name)}")
        names = [each.get("name", str(each["id"])) for each in categories]
        for other in ("supercategory", "id"):
            count = Counter(names)
            names = [
                f"{name} ({each.get(other, '')})" if count[name] > 1 else name
                for name, each in zip(names, categories, strict=True)
            ]
        return check_class_names(names, f"{self.path}: names of categories")

    def __len__(self) -> int:
        return len(self._files)

    def describe(self) -> dict[str, Any]:
        return {"kind": "coco", "path": str(self.path), **self._left_out}

    def inputs(self) -> list[Path]:
        folders = {PurePosixPath(name).parts[0] for name in self._files}
        return [self.path, *(self.path.parent / folder for folder in sorted(folders))]

    def name(self, index: int) -> str:
        return str(self.path.parent / self._files[index])

    def read(self, index: int) -> tuple[bytes, int, str]:
        name = self.name(index)
        return read_image(Path(name)), int(self._labels[index]), name


def _is_text(name: str) -> bool:
    """Whether `name` has no lone surrogates: JSON allows them, file systems and terminals do not."""
    return not any("\ud800" <= character <= "\udfff" for character in name)
