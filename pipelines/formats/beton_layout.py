"""The layout of a beton file, which the reader, the writer and the checks share.

FFCV's format, version 2. Little-endian: a header, one descriptor per field, one metadata record per sample, the stored
images, and the allocation table with the size of each image. No image crosses a page boundary, counted from the start
of the file; gaps between images are zeros. The fields are an RGBImageField and an IntField, as ffcv-imagenet writes
them. A sidecar `<name>.beton.json` lies beside the file, see `sidecar`.
"""

from pathlib import Path

import numpy as np

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.files import beside

VERSION = 2
JPEG, RAW = 0, 1
MIN_PAGE, DEFAULT_PAGE, MAX_PAGE = 1 << 21, 1 << 23, 1 << 31
MAX_CLASSES = 1 << 20  # without class names the largest label sets the number of classes, and so the size of a model
MAX_SIDE = 65535  # sides are stored in 16 bits
MAX_PIXELS = 89_478_485  # of an image, before it is decoded: PIL's MAX_IMAGE_PIXELS, above which PIL warns
MAX_SCANS = 64  # of a progressive JPEG: encoders write about ten, and each one costs a full decoding pass

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
FIELDS = ((2, b"image"), (1, b"label"))  # type ids of RGBImageField and IntField
# The image's record is packed, the label after it aligned to 8 bytes.
SAMPLE = np.dtype(
    {
        "names": ["mode", "width", "height", "data_ptr", "label"],
        "formats": ["u1", "<u2", "<u2", "<u8", "<i8"],
        "offsets": [0, 1, 3, 5, 16],
        "itemsize": 24,
    }
)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
METADATA_START = HEADER.itemsize + len(FIELDS) * FIELD.itemsize

KIND = "fastdeit-beton"


class BetonError(UserError):
    """A beton file, or its sidecar, that cannot be read or written as asked."""


def sidecar_path(path: Path) -> Path:
    """The path of the sidecar of the beton file at `path`."""
    return beside(path, ".json")


def field_descriptors(names: np.ndarray | None = None) -> np.ndarray:
    """The descriptors of both fields, (2,) FIELD; FFCV's own writer takes their names from its caller."""
    fields = np.zeros(len(FIELDS), FIELD)
    fields["type_id"], fields["name"] = zip(*FIELDS, strict=True)
    if names is not None:
        fields["name"] = names
    return fields
