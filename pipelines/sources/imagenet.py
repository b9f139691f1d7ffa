"""ImageNet as it is distributed: ILSVRC2012's tar files, ImageNet-V2's archives, ImageNet-ReaL's labels."""

import csv
import io
import os
import re
import struct
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fastdeit.pipelines.errors import fact
from fastdeit.pipelines.parsing import parse_json
from fastdeit.pipelines.sources import tar
from fastdeit.pipelines.sources.base import SampleError, SourceError, class_labels, is_image
from fastdeit.pipelines.sources.files import read_bytes, read_text

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
# Files with the classes of the val images, in order of preference: the devkit's, Kaggle's, TensorFlow's.
VAL_LABELS = (DEVKIT, "LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt")
MAX_DEVKIT = 1 << 26  # bytes, unzipped; it is 8 MB
_WNID = re.compile(r"n\d{8}")
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG$", re.IGNORECASE)


class _TarImages:
    """Labelled images in one tar archive; subclasses set the attributes."""

    kind = ""
    archive: tar.Archive
    class_names: list[str] | None
    members: list[str]
    place: np.ndarray  # (N, 3) int64: offset and size in the archive, and label, -1 for none
    left_out: dict[str, int]

    @property
    def in_memory(self) -> bool:
        return self.archive.data is not None

    def _index(self) -> list[tuple[str, int, int]]:
        """Name, offset and size of the archive's images; what else there is, is counted."""
        with tar.progress(self.archive.size) as bar:
            members = tar.index(self.archive, str(self.archive.path), bar=bar)
        found = _images(members)
        others = len(members.names) - len(found)
        self.left_out = {"files_that_are_no_images": others, "hidden_files": members.ignored}
        return found

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        return f"{self.archive.path}:{self.members[index]}"

    def inputs(self) -> list[Path]:
        return [self.archive.path]

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "path": str(self.archive.path), **self.left_out}

    def read(self, index: int) -> tuple[bytes, int, str]:
        offset, size, label = self.place[index].tolist()
        name = self.name(index)
        if label < 0:
            raise SampleError(f"{name}: is not in a folder named by the number of its class. Move it to one")
        return self.archive.member(name, offset, size), label, name

    def _fill(self, images: list[tuple[Any, ...]]) -> None:
        """Sort `images`, tuples that end in the member's name, offset, size and label, and set members and places."""
        if not images:
            raise SourceError(f"{self.archive.path}: no images in it")
        images.sort()
        self.members = [image[-4] for image in images]
        self.place = np.array([image[-3:] for image in images], np.int64)


def _images(members: tar.Members) -> list[tuple[str, int, int]]:
    """Name, offset and size of the members that are images."""
    each = zip(members.names, members.offset.tolist(), members.size.tolist(), strict=True)
    return [member for member in each if is_image(member[0])]


class ImageNetTrain(_TarImages):
    """ILSVRC2012_img_train.tar, which holds a tar for each class; the samples are those of the unpacked ImageFolder.

    Labels are ranks among the sorted wnids, or places in `class_names`, a list of wnids. Raises SourceError.
    """

    kind = "imagenet train"

    def __init__(self, path: Path, class_names: list[str] | None = None) -> None:
        self.archive = tar.Archive(path)
        with tar.progress(self.archive.size) as bar:
            outer = tar.index(self.archive, str(path))
            wnids = [name.removesuffix(".tar") for name in outer.names]
            for name, wnid in zip(outer.names, wnids, strict=True):
                if not (_WNID.fullmatch(wnid) and name.endswith(".tar")):
                    raise SourceError(f"{path}:{name}: not a class's tar, such as n01440764.tar: this is not {TRAIN}")
            label = class_labels(wnids, class_names, str(path))
            self.class_names = list(label)
            images: list[tuple[Any, ...]] = []
            hidden, others = outer.ignored, 0
            for wnid, start, size in zip(wnids, outer.offset.tolist(), outer.size.tolist(), strict=True):
                inner = tar.index(self.archive, f"{path}:{wnid}.tar", start, start + size, bar)
                found = _images(inner)
                if not found:
                    raise SourceError(f"{path}:{wnid}.tar: no images of this class in it. Fetch the archive again")
                images += [(wnid, *image, label[wnid]) for image in found]
                hidden += inner.ignored
                others += len(inner.names) - len(found)
        self.left_out = {"files_that_are_no_images": others, "hidden_files": hidden}
        self._fill(images)
        self._wnid = {i: name for name, i in label.items()}

    def name(self, index: int) -> str:
        return f"{self.archive.path}:{self._wnid[int(self.place[index, 2])]}.tar:{self.members[index]}"


class ImageNetVal(_TarImages):
    """ILSVRC2012_img_val.tar, in the order of its file numbers; another file holds the classes.

    labels  the devkit's archive, Kaggle's LOC_val_solution.csv, or a file with a wnid a line in the order of the
            file numbers; None: the first of `VAL_LABELS` beside the tar

    Labels are ranks among the sorted wnids, or places in `class_names`, a list of wnids. Raises SourceError.
    """

    kind = "imagenet val"

    def __init__(self, path: Path, class_names: list[str] | None = None, labels: Path | None = None) -> None:
        self.archive = tar.Archive(path)
        self.labels = labels or _labels_beside(path)
        wnids, truth = _val_truth(self.labels)
        found = self._index()
        if len(found) != len(truth):
            raise SourceError(f"{path}: {len(found)} images, but {len(truth)} labels in {self.labels}")
        label = class_labels(wnids, class_names, str(self.labels))
        self.class_names = list(label)
        images: list[tuple[Any, ...]] = []
        for name, offset, size in found:
            number = image_number(name)
            if number is None or not 1 <= number <= len(truth):
                raise SourceError(f"{path}:{name}: not ILSVRC2012_val_XXXXXXXX.JPEG with a number up to {len(truth)}")
            images.append((name.rpartition("/")[2], name, offset, size, label[truth[number - 1]]))
        if len({image[0] for image in images}) != len(images):
            raise SourceError(f"{path}: has an image twice, in several folders")
        self._fill(images)

    def inputs(self) -> list[Path]:
        return [*super().inputs(), self.labels]

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "labels": str(self.labels)}


class ImageNetV2(_TarImages):
    """An archive of ImageNet-V2 (.tar.gz, or gunzipped): folders of images, named by the number of their class.

    Numbers count the sorted wnids of ILSVRC2012 from 0; these are the class names unless others are given. Reading an
    image from any other folder raises SampleError. Raises SourceError if no image is in a numbered folder.
    """

    kind = "imagenet v2"

    def __init__(self, path: Path, class_names: list[str] | None = None) -> None:
        self.archive = tar.Archive(path)
        self.class_names = class_names or _wnids()
        found = self._index()
        images: list[tuple[Any, ...]] = []
        for name, offset, size in found:
            folder = name.split("/")[-2:-1]
            numbered = folder and re.fullmatch(r"[0-9]{1,6}", folder[0])
            label = int(folder[0]) if numbered else -1
            images.append((label, name, offset, size, label))
        if images and max(images)[0] < 0:
            raise SourceError(f"{path}:{images[0][1]}: is not in a folder named by the number of its class")
        self._fill(images)


def _wnids() -> list[str]:
    """ILSVRC2012's wnids in the order of its labels, as timm lists them."""
    from timm.data import ImageNetInfo  # takes seconds to import

    return ImageNetInfo("imagenet-1k").label_names()


def image_number(name: str) -> int | None:
    """The number in the name of one of ILSVRC2012's val images, from 1; None for another name."""
    match = _VAL_IMAGE.search(name)
    return int(match[1]) if match else None


def real_labels(path: Path, names: Sequence[str]) -> list[list[int]]:
    """ImageNet-ReaL's classes for each of `names`, samples of ILSVRC2012's val set in any order.

    path   real.json, a list of lists: entry i belongs to ILSVRC2012_val_{i + 1:08d}.JPEG. The file is that of
           Beyer et al., "Are we done with ImageNet?" (arXiv 2006.07159); `timm`: the copy that timm ships
    names  from `Source.name`

    Raises SourceError for another kind of file, or for a name of another image.
    """
    if str(path) == "timm":
        path = Path(str(resources.files("timm.data") / "_info" / "imagenet_real_labels.json"))
    try:
        lists = parse_json(read_bytes(path))
    except ValueError as error:
        raise SourceError(f"{path}: not JSON ({error}). Fetch it again") from error
    if not isinstance(lists, list) or not lists:
        raise SourceError(f"{path}: not a list of a list of classes for every image. Is it ImageNet-ReaL's real.json?")
    for i, classes in enumerate(lists):
        if not (isinstance(classes, list) and all(type(c) is int and c >= 0 for c in classes)):
            raise SourceError(f"{path}: entry {i} is not a list of class numbers. Fetch it again")
    real: list[list[int]] = []
    for name in names:
        number = image_number(name)
        if number is None or not 1 <= number <= len(lists):
            raise SourceError(
                f"{name}: not one of ILSVRC2012's val images 1 to {len(lists)}, of which {path} holds the labels"
            )
        real.append(lists[number - 1])
    return real


def _labels_beside(path: Path) -> Path:
    for name in VAL_LABELS:
        if os.path.lexists(labels := path.with_name(name)):
            return labels
    raise SourceError(
        f"{path}: its labels are not beside it: put {DEVKIT} there, "
        f"or name a file with a wnid a line: imagenet:{path}#labels=FILE"
    )


def _val_truth(path: Path) -> tuple[list[str], list[str]]:
    """All wnids, and the wnid of each val image by its file number."""
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return _devkit(path)
    text = read_text(path)
    truth = _kaggle(path, text) if path.suffix == ".csv" else [line.strip() for line in text.splitlines()]
    for line, wnid in enumerate(truth, 1):
        if not _WNID.fullmatch(wnid):
            raise SourceError(f"{path}, image {line}: '{wnid}' is not a wnid such as n01440764")
    return sorted(set(truth)), truth


def _kaggle(path: Path, text: str) -> list[str]:
    """Rows `ILSVRC2012_val_00000001,n01751748 111 108 230 366 ...`, in any order."""
    wnid: dict[int, str] = {}
    try:
        for row in csv.DictReader(io.StringIO(text)):
            number = image_number(f"{row['ImageId']}.JPEG")
            wnid[number or 0] = row["PredictionString"].split(" ")[0]
    except (KeyError, AttributeError, csv.Error) as error:
        raise SourceError(f"{path}: not a table of ImageId and PredictionString, as LOC_val_solution.csv is") from error
    if sorted(wnid) != list(range(1, len(wnid) + 1)):
        raise SourceError(f"{path}: its ImageId are not ILSVRC2012_val_00000001 to the last without a gap")
    return [wnid[number] for number in sorted(wnid)]


def _devkit(path: Path) -> tuple[list[str], list[str]]:
    archive = tar.Archive(path, MAX_DEVKIT)
    members = tar.index(archive, str(path))

    def content(end: str) -> bytes:
        for name, offset, size in zip(members.names, members.offset.tolist(), members.size.tolist(), strict=True):
            if f"/{name}".endswith(end):
                return archive.read(offset, size)
        raise SourceError(f"{path}: holds no {end[1:]}: this is not {DEVKIT}")

    wnid = _leaves(content("/data/meta.mat"), f"{path}:data/meta.mat")
    truth = content("/data/ILSVRC2012_validation_ground_truth.txt").decode("latin1").split()
    for line, number in enumerate(truth, 1):
        if not (number.isdecimal() and len(number) < 10 and int(number) in wnid):
            raise SourceError(
                f"{path}: line {line} of the ground truth, '{number}', is not the ILSVRC2012_ID of a class"
            )
    return sorted(wnid.values()), [wnid[int(number)] for number in truth]


def _check_mat(data: bytes, where: str) -> None:
    """Raise SourceError for a MATLAB file of version 5 that unpacks to more than `MAX_DEVKIT` bytes.

    After a header of 128 bytes come elements, each with a type and a size as uint32; type 15 is a zlib stream
    (MathWorks, "MAT-File Format", chapter 1).
    """
    if data[126:128] not in (b"IM", b"MI"):
        raise SourceError(f"{where}: not a MATLAB file of version 5. Fetch it again")
    order = "<" if data[126:128] == b"IM" else ">"
    at, left = 128, MAX_DEVKIT
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        if kind == 15:
            try:
                left -= len(zlib.decompressobj().decompress(data[at + 8 : at + 8 + size], left + 1))
            except zlib.error as error:
                raise SourceError(f"{where}: damaged ({error}). Fetch it again") from error
            if left < 0:
                raise SourceError(f"{where}: unpacks to more than {MAX_DEVKIT} bytes. Fetch it again")
        at += 8 + size


def _leaves(meta: bytes, where: str) -> dict[int, str]:
    """The wnid of every ILSVRC2012_ID that is a class: those without children in WordNet's tree."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise SourceError(f"{where}: reading it needs SciPy: pip install scipy") from error
    _check_mat(meta, where)
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"])
        fields = (synsets[name].tolist() for name in ("ILSVRC2012_ID", "WNID", "num_children"))
        wnid = {int(number): str(name) for number, name, children in zip(*fields, strict=True) if children == 0}
    # On a damaged file, SciPy raises almost anything.
    except Exception as error:
        raise SourceError(f"{where}: cannot be read ({type(error).__name__}: {fact(error)}). Fetch it again") from error
    if not wnid or not all(_WNID.fullmatch(name) for name in wnid.values()):
        raise SourceError(f"{where}: names no classes by wnid. Fetch it again")
    return wnid
