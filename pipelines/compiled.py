"""How functions are compiled that others of other files are compiled into.

Numba keeps compiled code on disk and throws it away when the file of the function changes, but not when a function that
was compiled into it changes in another file, so an update could go on running old code. Here code is also thrown away
when any file changes that others are compiled from: those of the host stage, of the random numbers and of the plan.
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_FOLDER = Path(__file__).parent
_SHARED = [*sorted((_FOLDER / "host").glob("*.py")), _FOLDER / "philox.py", _FOLDER / "plan.py"]
_STAMP = hashlib.sha256(b"".join(path.read_bytes() for path in _SHARED)).hexdigest()


def compiled(function: Callable[..., Any]) -> Any:
    """Compile `function` with numba: cached on disk, without the interpreter's lock, division as NumPy does it."""
    dispatcher = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    index = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if index is not None and hasattr(index, "_source_stamp"):
        own = Path(inspect.getfile(function)).read_bytes()
        index._source_stamp = _STAMP + hashlib.sha256(own).hexdigest()
        return dispatcher
    warnings.warn(
        f"numba {numba.__version__} keeps its cache in a way that is not known here: every process compiles anew, "
        "which takes half a minute",
        stacklevel=2,
    )
    return numba.njit(nogil=True, error_model="numpy")(function)


def is_compiled(dispatcher: Any) -> bool | None:
    """Whether the disk holds code of a function that `compiled` made, for these files; None where that is not known."""
    index = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    try:
        return bool(index._load_index())  # pyright: ignore[reportOptionalMemberAccess]
    except Exception:  # numba's own business, which another version may do in another way
        return None


def inlined(function: Callable[..., Any]) -> Any:
    """Compile `function` into its callers."""
    return numba.njit(nogil=True, error_model="numpy", inline="always")(function)
