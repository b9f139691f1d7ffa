"""The FFCV loader: decodes with libjpeg-turbo, through the C library that FFCV ships."""

import ctypes
import functools
import importlib.util
from pathlib import Path

import numpy as np

from fastdeit.pipelines.errors import UserError, fact
from fastdeit.pipelines.loaders.base import Region, ThreadedLoader, check_size, read_stored, read_with_pil
from fastdeit.pipelines.loaders.jpeg_markers import frame_size


class FfcvLoader(ThreadedLoader):
    """Decodes through libffcv's `imdecode`, which FFCV's own RGB decoders call.

    It uses libjpeg-turbo's fast integer DCT; PIL uses the accurate one. On photographs, a pixel differs from PIL's by
    at most 10 levels for JPEGs of quality 75 to 92 (by 1 on average, 0.8 of it darker), and by at most 20 at quality
    95. Above that the fast DCT loses more precision. Chroma subsampling makes no difference. PIL reads images that
    libffcv refuses or warns about; the batch's `fallbacks` lists them.

    libffcv keeps two libjpeg-turbo handles for every calling thread and never frees them. Therefore only the pool's
    threads decode, and a pool should live long.

    Raises UserError if FFCV is not installed or cannot be loaded.
    """

    name, pixels = "ffcv", "ffcv"

    def _load(self) -> None:
        self._imdecode = _load(find_libffcv()).imdecode

    def decode_image(self, index: int, out: np.ndarray, region: Region | None = None) -> bool:
        stored = read_stored(self.dataset, index)
        height, width, _ = out.shape
        size = frame_size(stored)
        if size != (0, 0):
            # libjpeg-turbo would silently scale an image of another size to fit.
            check_size(self.dataset, index, *size)
            refused = self._imdecode(
                stored.ctypes.data, stored.size, height, width, out.ctypes.data, height, width, 0, 0, 1, 1, False, False
            )
            if not refused:
                return True
        read_with_pil(self.dataset, index, out)
        return False


def find_libffcv() -> Path:
    """Path of FFCV's compiled library, without importing FFCV, which takes seconds.

    Raises UserError if it is missing or cannot be loaded, with the reason and what to install.
    """
    install = "install FFCV (pip install 'fastdeit[ffcv]', with libturbojpeg and OpenCV's libraries on the system)"
    spec = importlib.util.find_spec("ffcv")
    folders = list(spec.submodule_search_locations or []) if spec else []
    libraries = sorted(path for folder in folders for path in Path(folder).glob("_libffcv*.so"))
    if not libraries:
        raise UserError(f"the ffcv loader needs FFCV, which is not installed: {install}, or use the torch loader")
    try:
        _load(libraries[0])
    except (OSError, AttributeError) as error:
        raise UserError(
            f"FFCV's library cannot be loaded ({fact(error)}): {install}, or use the torch loader"
        ) from error
    return libraries[0]


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    size, pointer, flag = ctypes.c_uint32, ctypes.c_void_p, ctypes.c_bool
    # source, its bytes, height, width; output; crop height, width, x, y; scale as a fraction; do crop, do flip
    library.imdecode.argtypes = [pointer, ctypes.c_uint64, size, size, pointer, *[size] * 6, flag, flag]
    library.imdecode.restype = ctypes.c_int
    return library
