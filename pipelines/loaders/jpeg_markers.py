"""Reads the markers of a JPEG file without decoding it (ITU T.81, annex B)."""

import numpy as np

from fastdeit.pipelines.jit import cached


@cached(nogil=True)
def frame_size(jpeg: np.ndarray) -> tuple[int, int]:
    """Height and width, in pixels, from the frame header of (size,) uint8 bytes; (0, 0) if there is none."""
    at = _frame(jpeg)
    return (_two_bytes(jpeg, at + 5), _two_bytes(jpeg, at + 7)) if at else (0, 0)


@cached(nogil=True)
def is_common(jpeg: np.ndarray) -> bool:
    """Whether the frame header of (size,) uint8 bytes declares one, three or four 8-bit components."""
    at = _frame(jpeg)
    return at > 0 and jpeg[at + 4] == 8 and jpeg[at + 9] in (1, 3, 4)


@cached(nogil=True)
def _frame(jpeg: np.ndarray) -> int:
    """Position of the frame header's marker; 0 if there is no whole header."""
    at = 2
    while at + 10 <= len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker == 0xFF:  # padding
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return at
        elif marker == 0xDA:  # image data before any frame
            break
        else:
            at += 2 + _two_bytes(jpeg, at + 2)
    return 0


@cached(nogil=True)
def is_whole(jpeg: np.ndarray, max_scans: int) -> bool:
    """Whether (size,) uint8 bytes are an unbroken sequence of segments and scans up to the end marker.

    Also False if there are more than `max_scans` scans.
    """
    at, scans = 2, 0
    while at + 1 < len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker == 0xD9:
            return True
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker < 0xC0 or 0xD0 <= marker <= 0xD8 or 0xF0 <= marker <= 0xFD or at + 3 >= len(jpeg):
            return False
        at += 2 + _two_bytes(jpeg, at + 2)
        if marker == 0xDA:
            scans += 1
            if scans > max_scans:
                return False
            at = _end_of_scan(jpeg, at)
    return False


@cached(nogil=True)
def _end_of_scan(jpeg: np.ndarray, at: int) -> int:
    """Position of the first marker after the scan's data, or the end of the bytes."""
    last = len(jpeg) - 1
    while at < last:
        if jpeg[at] == 0xFF and jpeg[at + 1] != 0 and not 0xD0 <= jpeg[at + 1] <= 0xD7:
            return at
        at += 1
    return len(jpeg)


@cached(nogil=True)
def _two_bytes(data: np.ndarray, at: int) -> int:
    return 256 * int(data[at]) + int(data[at + 1])
