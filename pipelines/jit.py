"""Numba wrappers: compiled code is cached on disk if possible, and the cache key covers callees in other files.

Numba discards cached code when the file of its function changes, but not when a callee in another file does, so an
update could run old code. These wrappers also discard it when any file of `host/` or `plan/` changes.

Numba refuses to compile if it finds no folder for its cache, as in a container with a read-only installation and no
home folder. These wrappers then use the system's folder for temporary files, or compile without a cache.
"""

import hashlib
import inspect
import os
import pickle
import stat
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba

_FOLDER = Path(__file__).parent
_SHARED = sorted(path for folder in ("host", "plan") for path in (_FOLDER / folder).glob("*.py"))
_STAMP = hashlib.sha256(b"".join(path.read_bytes() for path in _SHARED)).hexdigest()
_REMEDY = "set NUMBA_CACHE_DIR to a folder that can be written"
_SLOW = "every process compiles again, which takes half a minute"


def compiled(function: Callable[..., Any]) -> Any:
    """Compile `function` with numba: cached on disk, without the GIL, with NumPy's division."""
    dispatcher = cached(nogil=True, error_model="numpy")(function)
    index = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if index is None:  # no cache
        return dispatcher
    if hasattr(index, "_source_stamp"):
        own = Path(inspect.getfile(function)).read_bytes()
        index._source_stamp = _STAMP + hashlib.sha256(own).hexdigest()
        return dispatcher
    _say_once(f"numba {numba.__version__} keeps its cache in an unknown way: {_SLOW}")
    return numba.njit(nogil=True, error_model="numpy")(function)


def is_compiled(dispatcher: Any) -> bool | None:
    """Whether the disk cache holds code for a function from `compiled`; None if unknown."""
    index = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    try:
        return bool(index._load_index())  # pyright: ignore[reportOptionalMemberAccess]
    except Exception:  # numba's internals, which may differ in another version
        return None


def inlined(function: Callable[..., Any]) -> Any:
    """Compile `function` into its callers."""
    return numba.njit(nogil=True, error_model="numpy", inline="always")(function)


def cached(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` with `options`, cached on disk if possible; otherwise it warns once."""

    def compile_cached(function: Callable[..., Any]) -> Any:
        dispatcher = _with_numbas_folder(function, options) or _with_own_folder(function, options)
        if dispatcher is None:
            _say_once(f"compiled code cannot be kept, since no folder for it can be written: {_SLOW}; {_REMEDY}")
            return numba.njit(**options)(function)
        _guard(dispatcher._cache)
        return dispatcher

    return compile_cached


def _with_numbas_folder(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return None


def _with_own_folder(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    folder = _own_folder()
    if folder is None:
        return None
    config: Any = numba.config
    before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
    try:
        dispatcher = _with_numbas_folder(function, options)
    finally:
        config.CACHE_DIR = before
    if dispatcher is not None:
        reason = "neither the installation nor the user's cache folder can be written"
        _say_once(f"compiled code is kept in {folder}, since {reason}; set NUMBA_CACHE_DIR to keep it elsewhere")
    return dispatcher


@cache
def _own_folder() -> Path | None:
    """A folder among the temporary files that only this user can write; None if there is no trusted one.

    Cached code is executed, so nobody else may be able to write it.
    """
    try:
        folder = Path(tempfile.gettempdir()) / f"fastdeit-numba-{os.getuid()}"
        above = os.stat(folder.parent).st_mode
        if above & 0o022 and not above & stat.S_ISVTX:
            return None  # others may rename files in it
        folder.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(folder)
    except OSError:
        return None
    own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    return folder if own else None


def _guard(store: Any) -> None:
    """Make an unreadable or unwritable cache a warning, not an error."""
    load, save = store.load_overload, store.save_overload

    def load_overload(*args: Any) -> Any:
        try:
            return load(*args)
        except Exception as error:  # a damaged file may raise anything
            _say_once(f"compiled code in {store.cache_path} cannot be read ({error}): it is compiled again")
            return None

    def save_overload(*args: Any) -> None:
        try:
            save(*args)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            _say_once(f"compiled code cannot be kept in {store.cache_path} ({error}): {_SLOW}; {_REMEDY}")

    store.load_overload, store.save_overload = load_overload, save_overload


@cache
def _say_once(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)


def _probe(x: int) -> int:
    return x + 1


def try_cache() -> Path | None:
    """Compile a small function. Returns the folder that caches it, or None if it is not cached."""
    dispatcher = compiled(_probe)
    if dispatcher(1) != 2:
        raise RuntimeError("numba computes 1 + 1 wrongly: install it again")
    index = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    return None if index is None or not os.path.exists(index._index_path) else Path(dispatcher._cache.cache_path)
