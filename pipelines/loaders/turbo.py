"""The turbo loader: decodes with libjpeg-turbo, bit-identical to Pillow, and only where the crops need it."""

import ctypes
import functools
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np

from fastdeit.pipelines.errors import UserError, fact
from fastdeit.pipelines.formats.beton_layout import MAX_SCANS
from fastdeit.pipelines.loaders.base import Region, ThreadedLoader, decode_error, read_stored, read_with_pil

_DECODED, _TOO_MANY_SCANS = 0, 2  # verdicts of jpeg.c


class TurboLoader(ThreadedLoader):
    """Decodes through libjpeg-turbo's C API, with the accurate integer DCT and fancy upsampling.

    Every pixel within an image's region equals Pillow's. Rows above the region are only entropy-decoded, and rows below
    it are not read, so damage there goes unnoticed (`fastdeit-convert --verify` finds it). It refuses CMYK, arithmetic
    coding, incomplete progressive files, and files that make libjpeg warn; PIL reads those, and the batch's `fallbacks`
    lists them. A file of more than 64 scans, each of which costs a full decoding pass, raises DecodeError.

    Raises UserError if the library was not built or cannot be loaded.
    """

    name, pixels = "turbo", "pillow"
    crops = True

    def _load(self) -> None:
        self._decode_part = _load(find_turbo())

    def decode_image(self, index: int, out: np.ndarray, region: Region | None = None) -> bool:
        stored = read_stored(self.dataset, index)
        height, width, _ = out.shape
        top, left, rows, columns = region or (0, 0, height, width)
        verdict = self._decode_part(
            stored.ctypes.data, stored.size, height, width, out.ctypes.data, 3 * width,
            left, top, left + columns, top + rows, MAX_SCANS,
        )  # fmt: skip
        if verdict == _TOO_MANY_SCANS:
            raise decode_error(
                self.dataset, index, f"a JPEG of more than {MAX_SCANS} scans; each one costs a full decoding pass"
            )
        if verdict != _DECODED:
            read_with_pil(self.dataset, index, out)
        return verdict == _DECODED


@functools.cache
def find_turbo() -> Path:
    """Path of the library, which is compiled when fastdeit is installed.

    Raises UserError if it was not built or cannot be loaded, with the reason and what to install.
    """
    remedy = (
        "install libjpeg-turbo 2.1 or later with its headers (libjpeg62-turbo-dev or libjpeg-turbo8-dev) and a C "
        "compiler, then fastdeit again (pip install --force-reinstall --no-deps --no-cache-dir), or use another loader"
    )
    candidates = [Path(__file__).with_name("_jpeg" + suffix) for suffix in EXTENSION_SUFFIXES]
    built = [path for path in candidates if path.exists()]
    # The newest: in a checkout, an older one may have been built under another name.
    library = max(built, key=lambda path: path.stat().st_mtime, default=None)
    if library is None:
        raise UserError(f"the turbo loader's library was not built when fastdeit was installed: {remedy}")
    try:
        _load(library)
    except (OSError, AttributeError) as error:
        raise UserError(f"the turbo loader's library cannot be loaded ({fact(error)}): {remedy}") from error
    return library


@functools.cache
def _load(path: Path) -> Callable[..., int]:
    decode = ctypes.CDLL(str(path)).fastdeit_decode
    size, pointer, side = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint32
    # source, its bytes, height, width; output, bytes of a row; x0, y0, x1, y1; most scans
    decode.argtypes = [pointer, size, side, side, pointer, size, side, side, side, side, ctypes.c_int]
    decode.restype = ctypes.c_int
    return decode
