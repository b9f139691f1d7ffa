"""Makes a batch from decoded images and a plan, on the CPU.

The unit of work is a pair of samples that mix. It stays in a core's cache from the crop to the finished floats. Threads
take units in turn and share nothing, so their number changes no pixel.
"""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdeit.pipelines.batch import Batch, DecodedBatch, normalized_levels
from fastdeit.pipelines.host.normalize import (
    NormalizeScratch,
    normalize_erase_mix,
    normalize_scratch,
    output,
)
from fastdeit.pipelines.host.operations import OperationScratch, apply_operations, operation_scratch
from fastdeit.pipelines.host.resize import ResizeScratch, resize, resize_scratch
from fastdeit.pipelines.jit import compiled, is_compiled
from fastdeit.pipelines.memory import Buffers
from fastdeit.pipelines.plan.checks import check_plan
from fastdeit.pipelines.plan.plan import BICUBIC, Plan, rotation_matrices

_CHUNK = 2  # units per turn of a thread
_BICUBIC = np.int64(BICUBIC)  # for a plain Python constant, numba would compile `resize` again


class _Work(NamedTuple):
    """A batch for the compiled code: `DecodedBatch` and `Plan`.

    unit   (U, 2) int64  samples to finish together; second -1: one alone
    """

    pixels: np.ndarray
    offset: np.ndarray
    pitch: np.ndarray
    source: np.ndarray
    index: np.ndarray
    repeat: np.ndarray
    crop: np.ndarray
    window: np.ndarray
    flip: np.ndarray
    op: np.ndarray
    arg: np.ndarray
    matrix: np.ndarray
    interp: np.ndarray
    erase: np.ndarray
    group: np.ndarray
    mix: np.ndarray
    lam: np.ndarray
    box: np.ndarray
    unit: np.ndarray


class _Scratch(NamedTuple):
    planes: np.ndarray  # (2, 3 * size * size) uint8
    tables: np.ndarray  # (2, 768) uint8
    resize: ResizeScratch
    operation: OperationScratch
    normalize: NormalizeScratch


class HostStage:
    """Turns decoded images and their plan into a batch.

    The pixels are those of Pillow 13 with timm's operations; `resize.py`, `photometric.py`, `geometric.py` and
    `normalize.py` give the bounds. A plan that does not fit its images raises ValueError naming the dataset index. The
    memory of a batch is reused once no tensor refers to it, so keep the batch until its copy to a GPU is done.

    img_size   side of the output, pixels
    mean, std  of the normalisation; geometric operations fill with the mean
    pool       runs the work together with the calling thread; may be shared
    threads    how many run at once, including the caller
    dtype      torch.float32 or torch.bfloat16
    pinned     whether the images lie in pinned memory, which a GPU copies faster and in the background
    """

    def __init__(
        self,
        img_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        *,
        pool: ThreadPoolExecutor,
        threads: int,
        dtype: torch.dtype = torch.float32,
        pinned: bool = False,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype {dtype} is not supported by the host stage: use torch.float32 or torch.bfloat16")
        self.img_size, self.dtype, self.threads = img_size, dtype, threads
        self._pool = pool
        self._levels = normalized_levels(mean, std)
        self._fill = np.array([min(255, round(255 * x)) for x in mean], np.uint8)
        self._buffers = Buffers(pinned=pinned)
        self._local = threading.local()

    def __call__(self, decoded: DecodedBatch, plan: Plan) -> Batch:
        """The batch of `plan`, whose samples must be those of `decoded`, in order."""
        check_plan(decoded, plan, self.img_size)
        count = len(plan)
        partner, mixed = plan.partner, plan.mixed
        first = np.nonzero(~mixed | (partner > np.arange(count)))[0]
        unit = np.stack([first, np.where(mixed, partner, -1)[first]], axis=1)
        images = self._run(decoded, plan, unit)
        label = torch.from_numpy(decoded.label)
        return Batch(
            images=images,
            label_a=label,
            label_b=torch.from_numpy(np.where(mixed, decoded.label[partner], decoded.label)),
            lam=torch.from_numpy(plan.lam[plan.group].astype(np.float32)),
            index=torch.from_numpy(decoded.index),
        )

    def _run(self, decoded: DecodedBatch, plan: Plan, unit: np.ndarray) -> Tensor:
        size = self.img_size
        work = _Work(
            pixels=_plain(decoded.host_pixels(), np.uint8),
            offset=_plain(decoded.offset, np.int64),
            pitch=_plain(decoded.width, np.int64) * 3,
            source=_plain(decoded.source, np.int64),
            index=_plain(plan.index, np.int64),
            repeat=_plain(plan.repeat, np.int64),
            crop=_plain(plan.crop, np.int64),
            window=_plain(plan.window, np.int64),
            flip=_plain(plan.flip, np.bool_),
            op=_plain(plan.op, np.int8),
            arg=_plain(plan.arg, np.float64),
            matrix=rotation_matrices(plan.op, plan.arg, size),
            interp=_plain(plan.interp, np.int8),
            erase=_plain(plan.erase, np.int64),
            group=_plain(plan.group, np.int64),
            mix=_plain(plan.mix, np.int8),
            lam=_plain(plan.lam, np.float64),
            box=_plain(plan.box, np.int64),
            unit=unit,
        )
        images, out = self._buffers.take((len(plan), 3, size, size), self.dtype)
        side = int(plan.crop[:, 2:].max(initial=1))
        turns = itertools.count(0, _CHUNK)
        batch = [(work, output(out.reshape(len(plan), 3 * size * size)))]

        def take_turns() -> None:
            work, out = batch[0]
            scratch = self._scratch(side)
            while (start := next(turns)) < len(unit):
                _run_units(
                    start, min(start + _CHUNK, len(unit)), work, np.uint64(plan.seed), plan.epoch,
                    self._levels, self._fill, size, out, scratch,
                )  # fmt: skip

        helpers = [self._pool.submit(take_turns) for _ in range(min(self.threads, len(unit)) - 1)]
        try:
            take_turns()
        finally:
            # Do not wait for a helper that never got a thread: nothing is left for it to do.
            for helper in helpers:
                if not helper.cancel():
                    helper.result()
            # The pool keeps cancelled helpers until a thread is free. They must not keep the batch's memory from reuse.
            batch.clear()
        return images

    def _scratch(self, side: int) -> _Scratch:
        """This thread's work memory, for crops up to `side` x `side`."""
        size, local = self.img_size, self._local
        if side > getattr(local, "side", 0):
            local.side = side
            local.scratch = _Scratch(
                planes=np.empty((2, 3 * size * size), np.uint8),
                tables=np.empty((2, 768), np.uint8),
                resize=resize_scratch(size, side),
                operation=operation_scratch(size),
                normalize=normalize_scratch(size),
            )
        return local.scratch


def _plain(array: np.ndarray, dtype: type) -> np.ndarray:
    """The array in C order, writable and of this dtype, so that one compiled form suffices; copies only if needed."""
    return np.require(array, dtype, ["C", "W"])


@compiled
def _run_units(first, last, work, seed, epoch, levels, fill, size, out, scratch):
    for unit in range(first, last):
        for member in range(2):
            sample = work.unit[unit, member]
            if sample < 0:
                continue
            slot = work.source[sample]
            pitch = work.pitch[slot]
            top, left, height, width = work.crop[sample]
            out_height, out_width, from_row, from_column = work.window[sample]
            offset = work.offset[slot] + top * pitch + 3 * left
            resize(
                work.pixels, offset, pitch, height, width, out_height, out_width, from_row, from_column,
                size, work.flip[sample], _BICUBIC, scratch.planes[member], scratch.resize,
            )  # fmt: skip
            apply_operations(
                scratch.planes[member], scratch.tables[member], work.op[sample], work.arg[sample],
                work.matrix[sample], work.interp[sample], fill, size, scratch.operation,
            )  # fmt: skip
        normalize_erase_mix(
            work.unit[unit, 0], work.unit[unit, 1], seed, epoch, work, scratch.planes, scratch.tables,
            levels, size, out, scratch.normalize,
        )  # fmt: skip


def compile_sentence() -> str | None:
    """A sentence for before the first batch, which compiles this file's code; None if it is compiled already."""
    return {
        True: None,
        False: "compiling the augmentation for this machine (numba, about a minute, only once)",
        None: "compiling or loading the augmentation (numba; the first run: about a minute)",
    }[is_compiled(_run_units)]
