"""Packs a batch's plan and labels into one block of memory, the table, which is copied to the device at once."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdeit.kernels import augment_levels, augment_normalize, augment_resize
from fastdeit.pipelines.batch import DecodedBatch
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.plan.plan import BICUBIC, CODE, CUTMIX, MIXUP, NO_MIX, OPS, Plan, rotation_matrices, tap_range

_ALIGNMENT = 128  # bytes, of each array
_MOST_BYTES = (1 << 31) - 1

_KERNEL_CODE = {
    "Identity": augment_levels.IDENTITY,
    "AutoContrast": augment_levels.AUTO_CONTRAST,
    "Equalize": augment_levels.EQUALIZE,
    "Invert": augment_levels.INVERT,
    "Rotate": augment_levels.AFFINE,
    "Posterize": augment_levels.POSTERIZE,
    "Solarize": augment_levels.SOLARIZE,
    "SolarizeAdd": augment_levels.SOLARIZE_ADD,
    "Color": augment_levels.COLOR,
    "Contrast": augment_levels.CONTRAST,
    "Brightness": augment_levels.BRIGHTNESS,
    "Sharpness": augment_levels.SHARPNESS,
    "ShearX": augment_levels.SHIFT_X,
    "ShearY": augment_levels.SHIFT_Y,
    "TranslateXRel": augment_levels.SHIFT_X,
    "TranslateYRel": augment_levels.SHIFT_Y,
    "GaussianBlur": augment_levels.BLUR,
}
_CODES = np.array([_KERNEL_CODE[name] for name in OPS], np.int32)
_MOVES = [
    augment_levels.COLOR,
    augment_levels.SHARPNESS,
    augment_levels.SHIFT_X,
    augment_levels.SHIFT_Y,
    augment_levels.AFFINE,
]
_KINDS = np.zeros(3, np.int32)
_KINDS[[NO_MIX, MIXUP, CUTMIX]] = augment_normalize.NO_MIX, augment_normalize.MIXUP, augment_normalize.CUTMIX


class Work(NamedTuple):
    """The first part of a table: arguments of `crop_resize`, `apply_operations` and `normalize_erase_mix`."""

    start: Tensor
    place: Tensor
    operation: Tensor
    argument: Tensor
    location: Tensor
    erase: Tensor
    identity: Tensor
    key: Tensor
    pairs: Tensor
    mix: Tensor
    mix_weights: Tensor


class Labels(NamedTuple):
    """The second part of a table: a batch's labels, (B,) each."""

    label_a: Tensor
    label_b: Tensor
    index: Tensor
    lam: Tensor


class Needs(NamedTuple):
    """Sizes of the work memory of a batch, and which layers blur any sample."""

    taps: int  # int32
    between: int  # bytes
    blurs: tuple[bool, ...]


def _work_fields(count: int, layers: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [
        ((count, augment_resize.START), torch.int64),
        ((count, augment_resize.PLACE), torch.int32),
        ((layers, count, augment_levels.OPERATION), torch.int32),
        ((layers, count, augment_levels.ARGUMENT), torch.float64),
        ((count, 2), torch.int32),
        ((count, 4), torch.int32),
        ((count, 2), torch.int64),
        ((2,), torch.int64),
        (((count + 1) // 2, 2), torch.int32),
        ((count, augment_normalize.MIX), torch.int32),
        ((count, 2), torch.float32),
    ]


def _label_fields(count: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [((count,), torch.int64)] * 3 + [((count,), torch.float32)]


def _sizes(fields: list[tuple[tuple[int, ...], torch.dtype]]) -> list[int]:
    """Bytes of every array, padded to the alignment."""
    exact = [math.prod(shape) * dtype.itemsize for shape, dtype in fields]
    return [size + -size % _ALIGNMENT for size in exact]


def _views(memory: Tensor, fields: list[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
    parts = memory.split(_sizes(fields))
    return [
        part[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for part, (shape, dtype) in zip(parts, fields, strict=True)
    ]


def table_sizes(count: int, layers: int) -> tuple[int, int]:
    """Bytes of `Work` and of `Labels`, which follows it, for `count` samples with `layers` operations each."""
    return sum(_sizes(_work_fields(count, layers))), sum(_sizes(_label_fields(count)))


def work_of(memory: Tensor, count: int, layers: int) -> Work:
    """The arrays in the first part of a table; `memory` is (bytes,) uint8."""
    return Work(*_views(memory, _work_fields(count, layers)))


def labels_of(memory: Tensor, count: int) -> Labels:
    """The arrays in the second part of a table; `memory` is (bytes,) uint8."""
    return Labels(*_views(memory, _label_fields(count)))


def fill_table(table: Tensor, decoded: DecodedBatch, plan: Plan) -> Needs:
    """Write a batch into `table`, (bytes,) uint8 on the host; `table_sizes` gives its size.

    Raises UserError with the dataset index for a crop whose rows span 2 GiB: the kernels count bytes in 32 bits.
    """
    count, layers = plan.op.shape
    first_bytes, _ = table_sizes(count, layers)
    work, labels = work_of(table[:first_bytes], count, layers), labels_of(table[first_bytes:], count)
    taps, between = _fill_resize(work, decoded, plan)
    blurs = _fill_operations(work, plan)
    _fill_normalize(work, plan)
    _fill_labels(labels, decoded, plan)
    return Needs(taps, between, blurs)


def _fill_resize(work: Work, decoded: DecodedBatch, plan: Plan) -> tuple[int, int]:
    place, start = work.place.numpy(), work.start.numpy()
    slot, crop, window, size = decoded.source, plan.crop, plan.window, plan.img_size
    pitch = 3 * decoded.width[slot]
    span = crop[:, 2].astype(np.int64) * pitch
    if span.max(initial=0) >= _MOST_BYTES:
        sample = int(span.argmax())
        raise UserError(
            f"dataset index {plan.index[sample]} (sample {sample} of the plan) is cropped from {span[sample]} bytes; "
            f"the device allows {_MOST_BYTES}: set --data.stage host, or convert with a smaller --max-side"
        )
    vertical_first = _vertical_first(crop, window)
    # The second pass reads along the rows, or along the columns if the vertical pass comes first.
    axis = vertical_first.astype(np.intp)
    samples = np.arange(len(plan))
    place[:, augment_resize.HEIGHT], place[:, augment_resize.WIDTH] = crop[:, 2], crop[:, 3]
    place[:, augment_resize.OUT_HEIGHT : augment_resize.LEFT + 1] = window
    first, end = tap_range(crop[samples, 2 + axis], window[samples, axis], window[samples, 2 + axis], size)
    place[:, augment_resize.FIRST], place[:, augment_resize.COUNT] = first, end - first
    place[:, augment_resize.VERTICAL_FIRST] = vertical_first
    place[:, augment_resize.FLIP] = plan.flip
    place[:, augment_resize.PITCH] = pitch

    rows, columns = (size * _most_taps(crop[:, 2 + i], window[:, i]) for i in (0, 1))
    between = 3 * size * (end - first)
    between += -between % 16
    taps_end, between_end = np.cumsum(rows + columns), np.cumsum(between)
    start[:, augment_resize.PIXELS] = (
        decoded.offset[slot] + crop[:, 0].astype(np.int64) * pitch + 3 * crop[:, 1].astype(np.int64)
    )
    start[:, augment_resize.BETWEEN] = between_end - between
    start[:, augment_resize.COLUMN_TAPS] = taps_end - rows - columns
    start[:, augment_resize.ROW_TAPS] = taps_end - rows
    return int(taps_end.max(initial=0)), int(between_end.max(initial=0))


def _vertical_first(crop: np.ndarray, window: np.ndarray) -> np.ndarray:
    """(B,) bool: whether PIL 13 runs the vertical pass first, as it does if the height shrinks much more."""
    shrink = crop[:, 2] - window[:, 0]
    return (shrink > 0) & (shrink > 2 * (crop[:, 3] - window[:, 1]))


def _most_taps(size_in: np.ndarray, size_out: np.ndarray) -> np.ndarray:
    """(B,) int64: most taps that one output of an axis can need."""
    return 2 * np.ceil(2.0 * np.maximum(size_in / size_out, 1.0)).astype(np.int64) + 1


def _fill_operations(work: Work, plan: Plan) -> tuple[bool, ...]:
    operation, argument = work.operation.numpy(), work.argument.numpy()
    argument[:] = rotation_matrices(plan.op, plan.arg, plan.img_size).transpose(1, 0, 2)
    side, pending = np.zeros(len(plan), np.int32), np.zeros(len(plan), np.bool_)
    for layer in range(plan.op.shape[1]):
        op, arg = plan.op[:, layer], plan.arg[:, layer]
        code = _CODES[op]
        operation[layer, :, augment_levels.CODE] = code
        operation[layer, :, augment_levels.CUBIC] = plan.interp[:, layer] == BICUBIC
        operation[layer, :, augment_levels.SIDE] = side
        operation[layer, :, augment_levels.PENDING] = pending
        translated = (op == CODE["TranslateXRel"]) | (op == CODE["TranslateYRel"])
        argument[layer, :, 0] = np.where(op == CODE["Rotate"], argument[layer, :, 0], np.where(translated, 0.0, arg))
        argument[layer, :, 1] = np.where(translated, arg * plan.img_size, argument[layer, :, 1])
        moves = np.isin(code, _MOVES)
        side = side ^ moves
        pending = (pending | (code != augment_levels.IDENTITY)) & ~moves & (code != augment_levels.BLUR)
    location = work.location.numpy()
    location[:, 0], location[:, 1] = side, pending
    return tuple((plan.op == CODE["GaussianBlur"]).any(0).tolist())


def _fill_normalize(work: Work, plan: Plan) -> None:
    group, partner, sample = plan.group, plan.partner, np.arange(len(plan))
    # The kernel works on pairs. Groups of odd size do not mix, so any two samples may then be a pair.
    paired = not (partner == sample).any()
    order = np.stack([sample, partner], axis=1)[sample < partner].reshape(-1) if paired else sample
    pairs = work.pairs.numpy().reshape(-1)
    pairs[len(plan) :] = -1
    pairs[: len(plan)] = order

    work.erase.numpy()[:] = plan.erase
    identity, mix, mix_weights = work.identity.numpy(), work.mix.numpy(), work.mix_weights.numpy()
    identity[:, 0], identity[:, 1] = plan.index, plan.repeat
    work.key.numpy()[:] = np.uint64(plan.seed).view(np.int64), plan.epoch
    mix[:, augment_normalize.KIND] = _KINDS[plan.mix][group]
    mix[:, augment_normalize.BOX_TOP :] = plan.box[group]
    mix_weights[:, 0], mix_weights[:, 1] = plan.lam[group], 1.0 - plan.lam[group]


def _fill_labels(labels: Labels, decoded: DecodedBatch, plan: Plan) -> None:
    labels.label_a.numpy()[:] = decoded.label
    labels.label_b.numpy()[:] = np.where(plan.mixed, decoded.label[plan.partner], decoded.label)
    labels.index.numpy()[:] = decoded.index
    labels.lam.numpy()[:] = plan.lam[plan.group]
