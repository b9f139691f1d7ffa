"""The DALI loader: NVIDIA DALI decodes, on the CPU or on a GPU."""

import importlib
import importlib.util
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numpy as np
import torch

from fastdeit.pipelines.errors import UserError, fact
from fastdeit.pipelines.formats.beton_layout import MAX_SCANS
from fastdeit.pipelines.formats.dataset import Dataset
from fastdeit.pipelines.loaders.base import DecodeError, Region, ThreadedLoader, check_size, read_stored, read_with_pil
from fastdeit.pipelines.loaders.jpeg_markers import frame_size, is_common, is_whole

T = TypeVar("T")
R = TypeVar("R")
_Task = tuple[int, Any, Region | None]  # dataset index, output (array or GPU tensor), and None: it does not crop
_Jpeg = tuple[_Task, np.ndarray]  # with the encoded bytes

_DEVICE_ROUNDING = 32 << 20  # bytes: batches of similar size then reuse the same memory
# Images per DALI call. On the CPU single images cost no more, and a failure affects only one. On a GPU the threads wait
# for each other at the end of a chunk, and the chunk's pixels are in memory twice.
_CPU_CHUNK, _GPU_CHUNK_PER_THREAD = 1, 32


class DaliLoader(ThreadedLoader):
    """Decodes through DALI's image decoder. The caller feeds each image, so DALI does not choose the order.

    device_id        GPU that decodes; None: the CPU
    hw_decoder_load  share of images, 0 to 1, for the GPU's hardware decoder, if it has one
    on_device        keep a batch's pixels on that GPU

    On the CPU each thread of the pool runs a pipeline of one image, through libjpeg-turbo with the accurate DCT and
    fancy upsampling: every pixel equals Pillow's. On a GPU, where its name is dali-mixed, DALI decodes 32 images per
    thread at once, with other decoders and other pixels, and holds them in memory besides the batch. DALI decides which
    images of a chunk the hardware decoder gets. Only with `hw_decoder_load` 0 do an image's pixels not depend on the
    rest of its chunk, the number of threads and processes, or a resume. This path has not been run on a GPU yet.

    DALI misses some kinds of damage. So it does not get a JPEG whose segments and scans do not reach the end marker,
    with more than 64 scans, or with other than one, three or four 8-bit components. PIL reads those and the images that
    DALI refuses; the batch's `fallbacks` lists them. One bad image fails DALI's whole chunk and its pipeline: the chunk
    is halved until the bad image is alone. Only one thread at a time may call `decode`.

    Raises UserError if DALI is not installed or cannot build its pipeline.
    """

    name, pixels = "dali", "pillow"

    def __init__(
        self,
        dataset: Dataset,
        *,
        pool: ThreadPoolExecutor,
        threads: int,
        device_id: int | None = None,
        hw_decoder_load: float = 0.65,
        on_device: bool = False,
        **options: Any,
    ) -> None:
        self._device = torch.device("cuda", device_id) if on_device and device_id is not None else None
        self.on_device = self._device is not None
        self._device_id, self._hw_decoder_load = device_id, hw_decoder_load
        if device_id is not None:
            self.name, self.pixels = "dali-mixed", "nvjpeg"
        self._chunk = _CPU_CHUNK if device_id is None else _GPU_CHUNK_PER_THREAD * threads
        self._unfit: set[int] = set()  # images that only PIL reads
        self._free = threading.Semaphore(threads if self._chunk == 1 else 1)  # limits pipelines in use
        self._idle: list[Any] = []
        super().__init__(dataset, pool=pool, threads=threads, **options)

    def _load(self) -> None:
        find_dali()
        try:
            self._idle.append(self._build())
        except (ImportError, OSError, RuntimeError) as error:
            reason = fact(error)
            raise UserError(
                f"DALI cannot build its pipeline ({reason}): run fastdeit-doctor, or use another loader"
            ) from error

    def _build(self) -> Any:
        """A new pipeline; takes milliseconds once DALI is imported."""
        dali: Any = importlib.import_module("nvidia.dali")
        where: dict[str, Any] = {"device": "cpu"}
        if self._device_id is not None:
            where = {
                "device": "mixed",
                "hw_decoder_load": self._hw_decoder_load,
                "jpeg_fancy_upsampling": True,
                "affine": False,  # true would pin the threads of every process to the same first cores
            }
        pipeline = dali.Pipeline(
            batch_size=self._chunk,
            num_threads=1 if self._chunk == 1 else self._threads,
            device_id=self._device_id,
            prefetch_queue_depth=1,  # `Prefetcher` does the prefetching
            exec_pipelined=False,
            exec_async=False,
        )
        with pipeline:
            encoded = dali.fn.external_source(name="jpeg", dtype=dali.types.UINT8, ndim=1, no_copy=True)
            pixels = dali.fn.decoders.image(
                encoded, output_type=dali.types.RGB, adjust_orientation=False, use_fast_idct=False, **where
            )
            pipeline.set_outputs(pixels)
        pipeline.build()
        return pipeline

    def close(self) -> None:
        super().close()
        self._idle.clear()

    def decode_image(self, index: int, out: np.ndarray, region: Region | None = None) -> bool:
        task = (index, out, None)
        jpeg = None if index in self._unfit else self._read(task)
        if jpeg is not None and not self._through_dali([(task, jpeg)]):
            return True
        read_with_pil(self.dataset, index, out)
        return False

    def _decode_all(self, tasks: list[_Task]) -> list[tuple[int, int, bool]]:
        if self._chunk == 1:
            return super()._decode_all(tasks)
        jpegs = [task for task in tasks if self.dataset.is_jpeg(task[0]) and task[0] not in self._unfit]
        undecoded: set[int] = set()
        for start in range(0, len(jpegs), self._chunk):
            chunk = jpegs[start : start + self._chunk]
            read = list(zip(chunk, self._in_pool(self._read_or_none, chunk), strict=True))
            undecoded.update(task[0] for task, jpeg in read if jpeg is None)
            refused = self._through_dali([(task, jpeg) for task, jpeg in read if jpeg is not None])
            undecoded.update(task[0] for task in refused)
        decoded = {task[0] for task in jpegs} - undecoded
        # The rest is raw or may be damaged: decode it one image at a time, as any loader does.
        rest = self._decode_on_host([task for task in tasks if task[0] not in decoded])
        return [(index, index, True) for index in sorted(decoded)] + rest

    def _decode_on_host(self, tasks: list[_Task]) -> list[tuple[int, int, bool]]:
        """Decode on the host, as any loader does, and copy the images to their outputs."""
        if self._device is None:
            return super()._decode_all(tasks)
        on_host = [np.empty(tuple(out.shape), np.uint8) for _, out, _ in tasks]
        done = super()._decode_all([(task[0], out, None) for task, out in zip(tasks, on_host, strict=True)])
        for task, out in zip(tasks, on_host, strict=True):
            task[1].copy_(torch.from_numpy(out))
        return done

    def _memory(self, size: int) -> np.ndarray | torch.Tensor:
        if self._device is None:
            return super()._memory(size)
        room = size + -size % _DEVICE_ROUNDING
        return torch.empty(room, dtype=torch.uint8, device=self._device)[:size]

    def _read(self, task: _Task) -> np.ndarray | None:
        """The encoded bytes if DALI may decode them, else None. Raises DecodeError for a wrong size or checksum."""
        index = task[0]
        jpeg = read_stored(self.dataset, index)
        size = frame_size(jpeg)
        if size != (0, 0):
            check_size(self.dataset, index, *size)
            # When DALI's parser refuses a header, it leaves the batch's other tasks running in freed memory, and the
            # process may crash (seen with DALI 2.4).
            if is_common(jpeg) and is_whole(jpeg, MAX_SCANS):
                return jpeg
        self._unfit.add(index)
        return None

    def _read_or_none(self, task: _Task) -> np.ndarray | None:
        try:
            return self._read(task)
        except DecodeError:  # raised again when the image is decoded alone and may be replaced
            return None

    def _through_dali(self, jpegs: list[_Jpeg]) -> list[_Task]:
        """Decode, halving where DALI fails. Returns the tasks that it refused."""
        if not jpegs or self._run(jpegs):
            return []
        if len(jpegs) == 1:
            task, _ = jpegs[0]
            self._unfit.add(task[0])
            return [task]
        middle = len(jpegs) // 2
        return self._through_dali(jpegs[:middle]) + self._through_dali(jpegs[middle:])

    def _run(self, jpegs: list[_Jpeg]) -> bool:
        """Decode up to one chunk. Returns whether DALI succeeded."""
        with self._free:
            self._check_open()
            pipeline = self._idle.pop() if self._idle else self._build()
            try:
                pipeline.feed_input("jpeg", [jpeg for _, jpeg in jpegs])
                (decoded,) = pipeline.run()
            except RuntimeError:
                return False  # the failed pipeline is not used again
            done = self._copy(decoded, [task[1] for task, _ in jpegs])
            self._idle.append(pipeline)
            return done

    def _copy(self, decoded: Any, outs: list[Any]) -> bool:
        """Copy DALI's output to `outs`. Returns False, without copying, if a shape differs."""
        if any(tuple(decoded[i].shape()) != tuple(out.shape) for i, out in enumerate(outs)):
            return False
        if isinstance(outs[0], torch.Tensor):
            for i, out in enumerate(outs):
                out.copy_(torch.from_dlpack(decoded[i]))
            if outs[0].is_cuda:  # DALI's next output may reuse the memory of this one
                torch.cuda.current_stream(outs[0].device).synchronize()
            return True
        if self._device_id is not None:
            decoded = decoded.as_cpu()

        def copy(i: int) -> None:
            outs[i][:] = np.asarray(decoded[i])

        self._in_pool(copy, range(len(outs)))
        return True

    def _in_pool(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Map `work` over `items` in the pool. No call is still running when this returns or raises."""
        if len(items) == 1:  # `decode_image` runs in the pool, whose threads may all be busy
            return [work(items[0])]
        stop = threading.Event()

        def some(first: int) -> list[R]:
            done = []
            try:
                for item in items[first :: self._threads]:
                    if stop.is_set() or self._closed.is_set():
                        break
                    done.append(work(item))
            except BaseException:
                stop.set()
                raise
            return done

        futures = [self._pool.submit(some, first) for first in range(min(self._threads, len(items)))]
        try:
            wait(futures)
        finally:
            stop.set()
            wait(futures)
        parts = [future.result() for future in futures]
        self._check_open()
        return [parts[i % self._threads][i // self._threads] for i in range(len(items))]

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RuntimeError(f"{self.dataset.path}: the loader was closed while it decoded a batch")


def find_dali() -> None:
    """Raise UserError, with what to install, unless DALI is installed. Does not import it, which takes a second."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        raise UserError(
            "the dali loader needs NVIDIA DALI, which is not installed: pip install 'fastdeit[dali]' "
            "(Linux on x86-64 or aarch64; 'fastdeit[dali-cuda13]' where the driver runs CUDA 13), or use another loader"
        )
