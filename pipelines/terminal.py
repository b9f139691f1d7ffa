"""Standard streams that escape whatever a terminal would act on, because names may come from untrusted files."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from fastdeit.pipelines.errors import printable

_RESET = "\x1b[0m"  # colorama writes this to a terminal at exit; numba imports colorama


class Escaping:
    """A text stream that escapes unprintable characters; it forwards everything else to the stream.

    Newlines, tabs and carriage returns pass, because progress bars need them; so does a lone colour reset. Characters
    that the stream's encoding lacks are escaped too.
    """

    _coloured = False  # whether `colours` lets everything pass

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        shown = text if Escaping._coloured or text == _RESET else printable(text, keep="\n\t\r")
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    @property
    def unwrapped(self) -> Any:
        """The stream that it writes to."""
        return self._stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:
        # tqdm takes its width from the terminal only for a file that equals a standard stream.
        return self is other or self._stream == other

    def __hash__(self) -> int:
        return hash(self._stream)


_format_warning = warnings.formatwarning


def _format_on_one_line(message: Warning | str, *more: Any, **options: Any) -> str:
    return _format_warning(printable(str(message)), *more, **options)


def escape_streams() -> None:
    """Make this process's stdout and stderr escape unprintable characters, also in tracebacks and warnings."""
    warnings.formatwarning = _format_on_one_line
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Escaping):
            setattr(sys, name, Escaping(stream))


@contextlib.contextmanager
def colours() -> Iterator[None]:
    """Let the block write its own escape sequences, as coloured help does."""
    Escaping._coloured = True
    try:
        yield
    finally:
        Escaping._coloured = False
