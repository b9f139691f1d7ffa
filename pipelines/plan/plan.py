"""The plan: every number that decides the pixels of a batch, as a small table.

A sample's row is a pure function of (seed, epoch, image index, repeat) and of the image's size; a mixing
group's row is a pure function of (seed, epoch, step, group). The pixels are a deterministic function of the JPEG
bytes and the plan, and every stage makes the same pixels.
"""

import math
from dataclasses import dataclass

import numpy as np

from fastdeit.pipelines.errors import UserError

# Operations by code. `Plan.arg` holds the argument of timm's function of that name: degrees, bits to keep, threshold,
# level to add, blend factor, shear factor, or fraction of the side. So timm and PIL can replay a plan.
OPS = (
    "Identity",
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
    "GaussianBlur",  # arg: PIL's radius
)
INCREASING = OPS[1:16]  # timm's "increasing" set of RandAugment, in its order
CODE = {name: code for code, name in enumerate(OPS)}

BILINEAR, BICUBIC = 2, 3  # PIL's own numbers
OVERHANG = 4  # pixels that a window may reach beyond its resized crop, which is reflected there
NO_MIX, MIXUP, CUTMIX = 0, 1, 2


@dataclass(frozen=True)
class Plan:
    """The augmentation of one step's samples on one rank: B samples, L layers of operations, G mixing groups.

    index   (B,) int64    dataset index
    repeat  (B,) int32    which repeat of the image
    crop    (B, 4) int32  top, left, height, width in the decoded image
    window  (B, 4) int32  height and width of the resized crop; top and left, in it, of the output square of side
                          `img_size`. The square may reach `OVERHANG` pixels beyond, where the resized crop is reflected
                          without repeating its border, as `numpy.pad(mode="reflect")` does
    flip    (B,) bool
    op      (B, L) int8   codes of `OPS`, applied in order after crop, resize and flip; 0: none
    arg     (B, L) float64
    interp  (B, L) int8   BILINEAR or BICUBIC, for the geometric operations
    erase   (B, 4) int32  top, left, height, width in the output; height 0: nothing erased
    group   (B,) int32    number of the sample's mixing group within the rank; groups are contiguous runs of
                          equal size, and a sample's partner is its mirror image within the group
    mix     (G,) int8     NO_MIX, MIXUP or CUTMIX
    lam     (G,) float64  share of the sample's own label (CutMix: of its own area, after clipping)
    box     (G, 4) int32  CutMix: top, left, bottom, right of the partner's part
    img_size              side of the output, pixels
    seed, epoch           key of the erasing noise, with index and repeat
    """

    index: np.ndarray
    repeat: np.ndarray
    crop: np.ndarray
    window: np.ndarray
    flip: np.ndarray
    op: np.ndarray
    arg: np.ndarray
    interp: np.ndarray
    erase: np.ndarray
    group: np.ndarray
    mix: np.ndarray
    lam: np.ndarray
    box: np.ndarray
    img_size: int
    seed: int
    epoch: int

    def __len__(self) -> int:
        return len(self.index)

    @property
    def partner(self) -> np.ndarray:
        """(B,) int64: position of each sample's partner, its mirror image within the mixing group."""
        position = np.arange(len(self))
        size = max(1, len(self) // max(1, len(self.mix)))
        return position - position % size + size - 1 - position % size

    @property
    def mixed(self) -> np.ndarray:
        """(B,) bool: whether a sample is mixed with its partner."""
        return (self.mix != NO_MIX)[self.group]

    def regions(self) -> np.ndarray:
        """(B, 4) int32: top, left, height, width of the part of its decoded image that each sample needs."""
        top, left, height, width = self.crop.T
        out_height, out_width, from_row, from_column = self.window.T
        first_row, end_row = _source_range(height, out_height, from_row, self.img_size)
        first_column, end_column = _source_range(width, out_width, from_column, self.img_size)
        region = top + first_row, left + first_column, end_row - first_row, end_column - first_column
        return np.stack(region, axis=1).astype(np.int32)


def _source_range(
    size_in: np.ndarray, size_out: np.ndarray, first: np.ndarray, wanted: int
) -> tuple[np.ndarray, np.ndarray]:
    """(B,) first and end of the inputs that PIL reads for outputs first .. first + wanted - 1."""
    start, end = tap_range(size_in, size_out, first, wanted)
    low, high = _shown(size_out, first, wanted)
    same = size_in == size_out  # PIL copies such an axis
    return np.where(same, low, start), np.where(same, high + 1, end)


def _shown(size_out: np.ndarray, first: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """(B,) first and last output of an axis that a window shows, which may be reflected at one end."""
    end, last = size_out - 1, first + wanted - 1
    return np.maximum(0, np.minimum(first, 2 * end - last)), np.minimum(end, np.maximum(last, -first))


def tap_range(
    size_in: np.ndarray, size_out: np.ndarray, first: np.ndarray, wanted: int
) -> tuple[np.ndarray, np.ndarray]:
    """(B,) first and end of the inputs with a bicubic weight in outputs first .. first + wanted - 1 of an axis.

    Outputs beyond the axis are those that are reflected there.
    """
    lowest, highest = _shown(size_out, first, wanted)
    scale = size_in / size_out
    support = 2.0 * np.maximum(scale, 1.0)
    low, high = (lowest + 0.5) * scale, (highest + 0.5) * scale
    start = np.maximum(0, (low - support + 0.5).astype(np.int64))
    return start, np.minimum(size_in, (high + support + 0.5).astype(np.int64))


def whole_windows(count: int, img_size: int) -> np.ndarray:
    """(count, 4) int32: windows that resize each crop to exactly the output."""
    return np.tile(np.array([img_size, img_size, 0, 0], np.int32), (count, 1))


def evaluation_plan(index: np.ndarray, height: np.ndarray, width: np.ndarray, img_size: int, eval_crop: float) -> Plan:
    """The evaluation plan of the images `index` (B,) of these sizes (B,), in pixels; nothing in it is random.

    Resizes the short side to int(img_size / eval_crop), bicubic, and keeps the center. Bit-identical to
    `timm.data.create_transform(is_training=False, crop_pct=eval_crop, interpolation="bicubic")`. Raises UserError
    unless 0 < eval_crop <= 1.
    """
    if not 0.0 < eval_crop <= 1.0:
        raise UserError(f"augment.eval_crop is {eval_crop}: it must be above 0 and at most 1")
    count = len(index)
    zeros = np.zeros(count, np.int32)
    return Plan(
        index=index,
        repeat=zeros,
        crop=np.stack([zeros, zeros, height, width], axis=1).astype(np.int32),
        window=_central_windows(height, width, img_size, eval_crop),
        flip=np.zeros(count, np.bool_),
        op=np.zeros((count, 0), np.int8),
        arg=np.zeros((count, 0), np.float64),
        interp=np.zeros((count, 0), np.int8),
        erase=np.zeros((count, 4), np.int32),
        group=zeros,
        mix=np.full(1, NO_MIX, np.int8),
        lam=np.ones(1, np.float64),
        box=np.zeros((1, 4), np.int32),
        img_size=img_size,
        seed=0,
        epoch=0,
    )


def _central_windows(height: np.ndarray, width: np.ndarray, img_size: int, eval_crop: float) -> np.ndarray:
    out = resized_sides(height, width, math.floor(img_size / eval_crop))
    return np.concatenate([out, np.rint((out - img_size) / 2.0)], axis=1).astype(np.int32)


def resized_sides(height: np.ndarray, width: np.ndarray, short: int) -> np.ndarray:
    """(B, 2) int32: height and width after torchvision's `Resize(short)`, which keeps an image's proportions."""
    least = np.minimum(height, width)
    # Of the short side this is `short` itself; of the long one torchvision cuts off the fraction, too.
    return np.stack([(short * side.astype(np.int64) / least).astype(np.int32) for side in (height, width)], axis=1)


def rotation_matrices(op: np.ndarray, arg: np.ndarray, size: int) -> np.ndarray:
    """(B, L, 6) float64: the matrix of each rotation in a plan's `op` and `arg` (B, L); zero for other operations."""
    out = np.zeros((*op.shape, 6), np.float64)
    for position in zip(*np.nonzero(op == CODE["Rotate"]), strict=True):
        out[position] = _rotation(float(arg[position]), size)
    return out


def _rotation(degrees: float, size: int) -> tuple[float, float, float, float, float, float]:
    """The matrix of `PIL.Image.rotate` for a square image: output to input coordinates, in pixels."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    center = size / 2
    return (
        cos,
        sin,
        cos * -center + sin * -center + 0.0 + center,
        round(-math.sin(angle), 15),
        cos,
        round(-math.sin(angle), 15) * -center + cos * -center + 0.0 + center,
    )
