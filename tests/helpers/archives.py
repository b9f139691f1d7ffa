"""Tiny JPEGs and tar archives for the tests of sources."""

import io
import tarfile

from PIL import Image


def jpeg(shade=0):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade % 256, shade // 256, 0)).save(file, "JPEG")
    return file.getvalue()


def packed(files, format=tarfile.GNU_FORMAT, mode="w"):
    """The bytes of an archive of `files`: bytes by name, or pairs of name and bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=format) as archive:
        for name, data in dict(files).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def pack(path, files, mode="w"):
    """Write an archive of `files` and return its path."""
    path.write_bytes(packed(files, mode=mode))
    return path
