"""The plan: everything random about a training batch, as a small table of numbers.

A sample's row is a pure function of (seed, epoch, image index, repeat) and of the image's size; a mixing
group's row is a pure function of (seed, epoch, step, group). The pixels are then a deterministic function of the
JPEG bytes and the plan; every stage computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Operations a plan can name, by code. `Plan.arg` holds what timm's own function of that name receives: degrees,
# bits to keep, threshold, level to add, blend factor, shear factor, fraction of the side. So a plan can be
# replayed through timm and PIL.
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
NO_MIX, MIXUP, CUTMIX = 0, 1, 2


@dataclass(frozen=True)
class Plan:
    """Random numbers of one step of one rank. B samples, L layers of operations, G mixing groups.

    index   (B,) int64    dataset index
    repeat  (B,) int32    which copy of the image
    crop    (B, 4) int32  top, left, height, width in the decoded image
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
    seed, epoch           key of the erasing noise, with index and repeat
    """

    index: np.ndarray
    repeat: np.ndarray
    crop: np.ndarray
    flip: np.ndarray
    op: np.ndarray
    arg: np.ndarray
    interp: np.ndarray
    erase: np.ndarray
    group: np.ndarray
    mix: np.ndarray
    lam: np.ndarray
    box: np.ndarray
    seed: int
    epoch: int

    def __len__(self) -> int:
        return len(self.index)

    @property
    def partner(self) -> np.ndarray:
        """(B,) int64: the mirror image of every sample within its mixing group."""
        place = np.arange(len(self))
        size = max(1, len(self) // max(1, len(self.mix)))
        return place - place % size + size - 1 - place % size

    @property
    def mixed(self) -> np.ndarray:
        """(B,) bool: whether a sample is mixed with its partner."""
        return (self.mix != NO_MIX)[self.group]


def evaluation_plan(index: np.ndarray, height: np.ndarray, width: np.ndarray) -> Plan:
    """A plan without randomness: the whole images `index` (B,), of these sizes (B,), and no operation."""
    count = len(index)
    zeros = np.zeros(count, np.int32)
    return Plan(
        index=index,
        repeat=zeros,
        crop=np.stack([zeros, zeros, height, width], axis=1).astype(np.int32),
        flip=np.zeros(count, np.bool_),
        op=np.zeros((count, 0), np.int8),
        arg=np.zeros((count, 0), np.float64),
        interp=np.zeros((count, 0), np.int8),
        erase=np.zeros((count, 4), np.int32),
        group=zeros,
        mix=np.full(1, NO_MIX, np.int8),
        lam=np.ones(1, np.float64),
        box=np.zeros((1, 4), np.int32),
        seed=0,
        epoch=0,
    )
