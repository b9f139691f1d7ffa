"""The augmentation stage on a GPU: makes the same pixels as the host stage.

A batch takes one copy of its table, one copy of its pixels and a dozen launches, whatever its size and operations. The
host waits only for the copy of the batch before last.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fastdeit.kernels.augment_normalize import Layout, normalize_erase_mix
from fastdeit.kernels.augment_ops import apply_operations
from fastdeit.kernels.augment_resize import crop_resize
from fastdeit.kernels.launch import DTYPES, check_device
from fastdeit.pipelines.batch import Batch, DecodedBatch, normalized_levels
from fastdeit.pipelines.device.packing import fill_table, labels_of, table_sizes, work_of
from fastdeit.pipelines.device.workspace import Memory, Uploads
from fastdeit.pipelines.plan.checks import check_plan
from fastdeit.pipelines.plan.plan import Plan


class DeviceStage:
    """Turns decoded images and their plan into a batch, on a GPU.

    The images are bit-identical to `HostStage` in every dtype that it supports. A plan that does not fit its images
    raises ValueError naming the dataset index. Make all batches on one stream. If the decoded pixels are already on the
    device, that stream must have written them.

    img_size   side of the output, pixels
    mean, std  of the normalisation; geometric operations also fill with the mean
    device     a CUDA device; the CPU where Triton's interpreter runs
    dtype      torch.float32, torch.float16 or torch.bfloat16
    layout     "nchw": (B, 3, S, S); "nhwc": (B, S, S, 3); "patches": (B, (S / P)^2, 3 * P * P), so that the patch
               embedding is a plain matrix product
    patch_size  P

    Raises ValueError for a device without kernels, an unsupported dtype, or "patches" with a side that is not a
    multiple of P.
    """

    def __init__(
        self,
        img_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        *,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        layout: Layout = "nchw",
        patch_size: int = 16,
    ) -> None:
        device = torch.device(device)
        check_device("the device stage", device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype} is not supported: use torch.float32, torch.float16 or torch.bfloat16")
        if layout not in ("nchw", "nhwc", "patches"):
            raise ValueError(f"layout {layout!r} is not 'nchw', 'nhwc' or 'patches'")
        if layout == "patches" and img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not a multiple of the patch size {patch_size}")
        self.img_size, self.device, self.dtype = img_size, device, dtype
        self.layout: Layout = layout
        self.patch_size = patch_size
        self._levels = torch.from_numpy(normalized_levels(mean, std)).to(device)
        self._fill = torch.tensor([min(255, round(255 * x)) for x in mean], dtype=torch.uint8, device=device)
        self._memory, self._uploads = Memory(device), Uploads(device)

    def __call__(self, decoded: DecodedBatch, plan: Plan, *, out: Tensor | None = None) -> Batch:
        """Make the batch of `plan`, whose samples must be those of `decoded`, in order.

        `decoded.pixels` may be a uint8 tensor on the host or the device; pinned pixels are copied without an
        intermediate buffer. `out`, contiguous and of the stage's shape and dtype, receives the images; by default they
        get new memory from PyTorch.
        """
        check_plan(decoded, plan, self.img_size)
        with self._on_device():
            count, layers = plan.op.shape
            work_bytes, _ = table_sizes(count, layers)
            table, passes, images = self._prepare(decoded, plan, out)
            for run in passes.values():
                run()
            labels = labels_of(table[work_bytes:].clone(), count)
            self._uploads.end()
        return Batch(images=images, label_a=labels.label_a, label_b=labels.label_b, lam=labels.lam, index=labels.index)

    def passes(self, decoded: DecodedBatch, plan: Plan) -> tuple[dict[str, Callable[[], None]], Tensor]:
        """The launches of one batch by name, in order, so that each can be timed; and the images that the last writes.

        The batch's inputs are already on the device. The launches are valid until the stage makes another batch.
        """
        check_plan(decoded, plan, self.img_size)
        with self._on_device():
            _, passes, images = self._prepare(decoded, plan, None)
            self._uploads.end()
        return passes, images

    @property
    def growths(self) -> int:
        """How often memory has grown; each time invalidates CUDA graphs of the launches."""
        return self._memory.growths + self._uploads.growths

    @property
    def passed_on(self) -> int:
        """Batches whose pixels were not pinned, so that the CPU copied them once more."""
        return self._uploads.passed_on

    def out_shape(self, count: int) -> tuple[int, ...]:
        """Shape of the images of `count` samples."""
        size, patch = self.img_size, self.patch_size
        if self.layout == "patches":
            return count, (size // patch) ** 2, 3 * patch * patch
        return (count, 3, size, size) if self.layout == "nchw" else (count, size, size, 3)

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _output(self, count: int, out: Tensor | None) -> Tensor:
        shape = self.out_shape(count)
        if out is None:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        if out.shape != shape or out.dtype != self.dtype or out.device != self.device or not out.is_contiguous():
            raise ValueError(
                f"out is {tuple(out.shape)} {out.dtype} on {out.device}: "
                f"give it contiguous {shape} {self.dtype} on {self.device}"
            )
        return out

    def _prepare(
        self, decoded: DecodedBatch, plan: Plan, out: Tensor | None
    ) -> tuple[Tensor, dict[str, Callable[[], None]], Tensor]:
        """Copy a batch to the device. Returns its table there, the launches that make its images, and the images."""
        (count, layers), size, memory = plan.op.shape, self.img_size, self._memory
        table = self._uploads.begin(sum(table_sizes(count, layers)))
        needs = fill_table(table, decoded, plan)
        images = self._output(count, out)
        table, pixels = self._uploads.send(decoded.pixels)
        work = work_of(table[: table_sizes(count, layers)[0]], count, layers)
        planes = memory.take("planes", (count, 2, 3, size, size))
        tables = memory.take("tables", (layers + 1, count, 3, 256))
        taps = memory.take("taps", (needs.taps,), torch.int32)
        reach = memory.take("reach", (count, 2, 2, size), torch.int32)
        between = memory.take("between", (needs.between,))

        def resize() -> None:
            crop_resize(pixels, work.place, work.start, taps, reach, between, planes[:, 0])

        def operations() -> None:
            apply_operations(planes, work.operation, work.argument, tables, self._fill, needs.blurs)

        def normalize() -> None:
            normalize_erase_mix(
                planes, work.location, tables[layers], self._levels, work.erase, work.identity, work.key, work.pairs,
                work.mix, work.mix_weights, images, layout=self.layout, patch_size=self.patch_size,
            )  # fmt: skip

        return table, {"resize": resize, "operations": operations, "normalize_erase_mix": normalize}, images
