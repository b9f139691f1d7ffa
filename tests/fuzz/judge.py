"""What is right: Pillow's pixels of the very file, and for FFCV's decoder libjpeg-turbo's own with the fast DCT."""

import contextlib
import ctypes
import ctypes.util
import functools
import importlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from fastdeit.pipelines.batch import DecodedBatch
from fastdeit.pipelines.conversion.encode import FORMATS, MAX_SCANS
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.dataset import Dataset
from fastdeit.pipelines.loaders.base import DecodeError
from fastdeit.pipelines.loaders.choose import FAST, LOADERS, open_loader
from fastdeit.pipelines.loaders.jpeg_markers import frame_size, is_whole
from fastdeit.pipelines.loaders.prefetch import make_pool
from fastdeit.pipelines.plan.order import EvalOrder, StepSamples

FFCV_LEVELS = 10  # its stated bound, for photographs of quality 75 to 92
REENCODED_MEAN = 3.0  # levels: JPEG's own loss at quality 100, of noise
_BATCH, _THREADS = 32, 2
_FAST_DCT, _NO_REALLOC = 2048, 1024  # turbojpeg.h


def pillow(file: bytes) -> np.ndarray:
    """Pillow's decode of all of `file`, upright, (H, W, 3): uint8, of 16 bits float64 in levels of 8 bits.

    Raises whatever Pillow does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(file), formats=FORMATS)
        image.load()
        # EXIF that cannot be read, or written again, says nothing.
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:
            image = image.copy()
        if image.mode.startswith("I"):
            return np.repeat(np.asarray(image)[:, :, None] / 257, 3, axis=2)
        return np.asarray(image.convert("RGB"))


@functools.cache
def _turbojpeg() -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    name = ctypes.util.find_library("turbojpeg")
    if name is None:
        raise UserError("FFCV's pixels are judged by libturbojpeg, which is not there: install libturbojpeg0")
    library = ctypes.CDLL(name)
    library.tjInitDecompress.restype = ctypes.c_void_p
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.tjDecompress2.argtypes = [pointer, pointer, ctypes.c_ulong, pointer, *[number] * 5]
    return library, ctypes.c_void_p(library.tjInitDecompress())


def fast_dct(jpeg: np.ndarray, height: int, width: int) -> np.ndarray | None:
    """libturbojpeg's decode with the fast DCT, (height, width, 3) uint8; None where it refuses or warns."""
    library, handle = _turbojpeg()
    out = np.empty((height, width, 3), np.uint8)
    refused = library.tjDecompress2(
        handle, jpeg.ctypes.data, jpeg.size, out.ctypes.data, width, 0, height, 0, _FAST_DCT | _NO_REALLOC
    )
    return None if refused else out


@dataclass(frozen=True)
class Expected:
    """A sample as its source has it: the file, its name, and whether it is undamaged; `pixels` of decoded ones."""

    name: str
    file: bytes
    whole: bool = False
    pixels: np.ndarray | None = None

    def decoded(self) -> np.ndarray:
        return pillow(self.file) if self.pixels is None else self.pixels


def stored_pixels(dataset: Dataset, index: int) -> np.ndarray:
    """What a stored sample is, by Pillow; raises what Pillow does."""
    stored = dataset.read(index)
    if dataset.is_jpeg(index):
        return np.asarray(Image.open(io.BytesIO(stored.tobytes()), formats=["JPEG"]).convert("RGB"))
    return stored.reshape(int(dataset.height[index]), int(dataset.width[index]), 3)


def check_stored(dataset: Dataset, samples: Sequence[Expected]) -> Iterator[str]:
    """What of a conversion is not what its source holds, a sentence each."""
    if len(samples) != len(dataset):
        yield f"{len(dataset)} samples, and {len(samples)} were not rejected"
        return
    for index, sample in enumerate(samples):
        try:
            right = sample.decoded()
        except Exception as error:
            yield f"{sample.name}: accepted, and Pillow cannot read it ({error!r})"
            continue
        found = stored_pixels(dataset, index)
        if right.shape != found.shape:
            yield f"{sample.name}: stored with shape {found.shape}, Pillow's is {right.shape}"
            continue
        difference = np.abs(found - right.astype(np.float64))
        if dataset.is_jpeg(index) and dataset.read(index).tobytes() != sample.file:
            if difference.mean() > REENCODED_MEAN:
                yield f"{sample.name}: encoded anew, {difference.mean():.2f} levels from Pillow's in the mean"
        elif difference.max() > (0.51 if right.dtype == np.float64 else 0):
            yield f"{sample.name}: stored {difference.max():.1f} levels from Pillow's"


def loaders() -> list[str]:
    """The loaders that can be used here, with what is slow to load of them loaded, once for all children."""
    found = []
    for name in LOADERS:
        with contextlib.suppress(UserError):
            FAST.get(name, lambda: None)()
            found.append(name)
    nothing = np.zeros(4, np.uint8)
    frame_size(nothing)
    is_whole(nothing, MAX_SCANS)
    if "ffcv" in found:
        _turbojpeg()
    if "dali" in found:
        importlib.import_module("nvidia.dali")
    return found


@dataclass(frozen=True)
class Finding:
    """What a loader did that it should not have, or that it refused an image."""

    text: str
    refused: bool = False


def check_loader(
    dataset: Dataset, name: str, *, crops: bool = False, undamaged: Sequence[bool] = (), batch: int = _BATCH
) -> Iterator[Finding]:
    """An epoch of the loader `name` compared with Pillow's pixels of what is stored.

    crops      ask for a region of every image, as training does, and compare that
    undamaged  of each sample whether it is a JPEG of usual quality as its encoder wrote it: FFCV's stated bound
               holds for those alone
    batch      images that one damaged among them costs
    """
    order = EvalOrder(len(dataset), batch=batch)
    with make_pool(_THREADS) as pool, open_loader(name, dataset, pool=pool, threads=_THREADS) as loader:
        for step in range(order.steps):
            samples = order.step(0, step)
            try:
                decoded = loader.decode(samples, _regions(dataset, samples) if crops else None)
            except DecodeError as error:
                yield Finding(f"{name}: {error}", refused=True)
                continue
            for sample, index in enumerate(decoded.index.tolist()):
                sure = index < len(undamaged) and undamaged[index]
                for what in _wrong(dataset, name, decoded, sample, index, sure, crops):
                    yield Finding(f"{name}{' by regions' if crops else ''}: sample {index}: {what}")


def _wrong(
    dataset: Dataset, name: str, decoded: DecodedBatch, sample: int, index: int, sure: bool, crops: bool
) -> Iterator[str]:
    slot = int(decoded.source[sample])
    found = decoded.image(slot)
    if int(decoded.label[sample]) != int(dataset.label[index]):
        yield f"label {decoded.label[sample]} for {dataset.label[index]}"
    try:
        right = stored_pixels(dataset, index)
    except Exception as error:
        if not crops:  # what lies below a region is not looked at
            yield f"loaded, and Pillow cannot read it ({error!r})"
        return
    if name == "ffcv" and dataset.is_jpeg(index) and index not in decoded.fallbacks:
        levels = int(np.abs(found.astype(np.int64) - right).max())
        if sure and levels > FFCV_LEVELS:
            yield f"{levels} levels from Pillow's"
        fast = fast_dct(dataset.read(index), *right.shape[:2])
        if fast is None:
            yield "libturbojpeg refuses it or warns, and it was not left to PIL"
            return
        right = fast
    top, left, height, width = 0, 0, *right.shape[:2]
    if decoded.region is not None:
        top, left, height, width = decoded.region[slot].tolist()
    window = slice(top, top + height), slice(left, left + width)
    if not np.array_equal(found[window], right[window]):
        yield "not the right pixels"


def _regions(dataset: Dataset, samples: StepSamples) -> np.ndarray:
    rng = np.random.default_rng([samples.epoch, samples.step])
    height, width = dataset.height[samples.index], dataset.width[samples.index]
    top, left = rng.integers(0, height), rng.integers(0, width)
    box = [top, left, rng.integers(1, height - top, endpoint=True), rng.integers(1, width - left, endpoint=True)]
    return np.stack(box, axis=1).astype(np.int32)


def check_loaders(
    dataset: Dataset, names: Sequence[str], undamaged: Sequence[bool] = (), batch: int = _BATCH
) -> Iterator[Finding]:
    """An epoch through each of the loaders, of those that crop also by regions."""
    for name in names:
        yield from check_loader(dataset, name, undamaged=undamaged, batch=batch)
        if LOADERS[name].crops:
            yield from check_loader(dataset, name, crops=True, batch=batch)
