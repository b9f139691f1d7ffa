"""Small JPEGs and tar archives for the tests of sources."""

import io
import tarfile

from PIL import Image


def jpeg(shade=0):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def pack(path, files, mode="w"):
    """Write an archive of `files`, bytes by name; its path."""
    with tarfile.open(path, mode) as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path
