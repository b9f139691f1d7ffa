"""How the host stage is compiled.

Numba keeps compiled code on disk and throws it away when the file of the function changes, but not when a function that
was compiled into it changes in another file, so an update could go on running old code. Here all code of the stage is
thrown away when any of its files changes.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_FOLDER = Path(__file__).parent
_SOURCES = [*sorted(_FOLDER.glob("*.py")), _FOLDER.parent / "philox.py", _FOLDER.parent / "plan.py"]
_STAMP = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()


def compiled(function: Callable[..., Any]) -> Any:
    """Compile `function` with numba: cached on disk, without the interpreter's lock, division as NumPy does it."""
    dispatcher = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    index = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if index is not None and hasattr(index, "_source_stamp"):
        index._source_stamp = _STAMP
        return dispatcher
    warnings.warn(
        f"numba {numba.__version__} keeps its cache in a way that is not known here: every process compiles the host "
        "stage anew, which takes half a minute",
        stacklevel=2,
    )
    return numba.njit(nogil=True, error_model="numpy")(function)


def inlined(function: Callable[..., Any]) -> Any:
    """Compile `function` into its callers."""
    return numba.njit(nogil=True, error_model="numpy", inline="always")(function)
