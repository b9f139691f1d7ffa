"""Checks that a plan fits its images. The compiled code that follows checks nothing."""

import numpy as np

from fastdeit.pipelines.batch import DecodedBatch
from fastdeit.pipelines.plan.plan import BICUBIC, BILINEAR, CODE, CUTMIX, MIXUP, NO_MIX, OPS, OVERHANG, Plan

_GEOMETRIC = [CODE[name] for name in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")]


def check_plan(decoded: DecodedBatch, plan: Plan, size: int) -> None:
    """Raise ValueError, naming the dataset index, if `plan` does not fit `decoded` or the output side `size`."""
    if plan.img_size != size:
        raise ValueError(f"the plan is for images of side {plan.img_size}, the stage makes images of side {size}")
    if len(plan) != len(decoded.index) or not np.array_equal(plan.index, decoded.index):
        raise ValueError(
            f"the plan of epoch {plan.epoch} does not have the samples of the decoded batch of epoch {decoded.epoch}, "
            f"step {decoded.step}: draw the plan from the order that the loader reads in"
        )
    if not len(plan):
        return
    slot = decoded.source
    _reject((slot < 0) | (slot >= len(decoded.offset)), plan, "is made of an image that the batch does not hold")
    rows, columns = decoded.height[slot], decoded.width[slot]
    end = decoded.offset[slot] + rows.astype(np.int64) * columns * 3
    _reject((decoded.offset[slot] < 0) | (end > len(decoded.pixels)), plan, "lies beyond the decoded pixels")
    _reject(_outside(plan.crop, rows, columns) | (plan.crop[:, 2:] < 1).any(1), plan, "is cropped outside its image")
    square = np.concatenate([plan.window[:, 2:] + OVERHANG, np.full((len(plan), 2), size, np.int32)], axis=1)
    sides = plan.window[:, :2]
    outside = _outside(square, sides[:, 0] + 2 * OVERHANG, sides[:, 1] + 2 * OVERHANG) | (sides < size).any(1)
    _reject(outside, plan, f"keeps a window of {size} x {size} outside its resized crop")
    if decoded.region is not None:
        missing = _beyond(plan.regions(), decoded.region[slot])
        _reject(missing, plan, "needs more of its image than was decoded: give the loader the same plan")
    _reject(_outside(plan.erase, size, size), plan, f"is erased outside the {size} x {size} output")
    _reject(
        ((plan.op < 0) | (plan.op >= len(OPS))).any(1), plan, f"has an operation whose code is not 0..{len(OPS) - 1}"
    )
    _reject(~np.isfinite(plan.arg).all(1), plan, "has an operation whose argument is not finite")
    posterized = (plan.op == CODE["Posterize"]) & ((plan.arg < 0) | (plan.arg > 8))
    _reject(posterized.any(1), plan, "is posterized to a number of bits that is not 0..8")
    blurred = (plan.op == CODE["GaussianBlur"]) & ((plan.arg < 0) | (plan.arg > size))
    _reject(blurred.any(1), plan, f"is blurred with a radius that is not 0..{size}")
    unknown = np.isin(plan.op, _GEOMETRIC) & ~np.isin(plan.interp, (BILINEAR, BICUBIC))
    _reject(unknown.any(1), plan, f"has an interpolation that is neither {BILINEAR} (bilinear) nor {BICUBIC} (bicubic)")
    _check_groups(plan, size)


def _check_groups(plan: Plan, size: int) -> None:
    groups = len(plan.mix)
    members = len(plan) // max(groups, 1)
    expected = np.repeat(np.arange(groups), members)
    if len(expected) != len(plan) or not np.array_equal(expected, plan.group):
        raise ValueError(
            f"the {len(plan)} samples of the plan from dataset index {plan.index[0]} on are not {groups} mixing groups "
            "of equal size, one behind another"
        )
    kind = plan.mix[plan.group]
    _reject(~np.isin(kind, (NO_MIX, MIXUP, CUTMIX)), plan, "is mixed in a way that is not 0, 1 or 2")
    if members % 2:
        _reject(kind != NO_MIX, plan, f"mixes in a group of {members} samples, which cannot be paired")
    lam = plan.lam[plan.group]
    _reject(~((lam >= 0) & (lam <= 1)), plan, "has a share of its own label that is not in [0, 1]")
    top, left, bottom, right = plan.box[plan.group].T
    inside = (top >= 0) & (top <= bottom) & (bottom <= size) & (left >= 0) & (left <= right) & (right <= size)
    _reject((kind == CUTMIX) & ~inside, plan, f"has a CutMix box outside the {size} x {size} output")


def _outside(box: np.ndarray, rows: np.ndarray | int, columns: np.ndarray | int) -> np.ndarray:
    """(B,) whether boxes (top, left, height, width) leave a plane of `rows` x `columns`."""
    top, left, height, width = box.astype(np.int64).T
    return (top < 0) | (left < 0) | (height < 0) | (width < 0) | (top + height > rows) | (left + width > columns)


def _beyond(box: np.ndarray, region: np.ndarray) -> np.ndarray:
    """(B,) whether boxes (top, left, height, width) leave their regions."""
    first, end = box[:, :2], box[:, :2] + box[:, 2:]
    return np.any((first < region[:, :2]) | (end > region[:, :2] + region[:, 2:]), axis=1)


def _reject(bad: np.ndarray | np.bool_, plan: Plan, what: str) -> None:
    if bad.any():
        sample = int(np.argmax(bad))
        raise ValueError(f"dataset index {plan.index[sample]} (sample {sample} of the plan) {what}")
