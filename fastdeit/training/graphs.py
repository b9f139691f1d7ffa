"""A training step as one CUDA graph: recorded once, then replayed with a single launch.

The graph holds the whole step: teacher, student, loss, backward pass, the sum of the gradients over the processes,
clipping, update, average. Where the update needs the host, the graph ends with the gradients. The networks in it are
those that torch.compile made. Its own "reduce-overhead" graphs end at a network's border, leave out the update, and
copy each network's inputs once more.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from fastdeit.config import Recipe
from fastdeit.distributed import World, release_before_leaving
from fastdeit.pipelines.errors import UserError, fact
from fastdeit.precision import Precision

WARM_UP = 3  # steps before the recording: compilation, choice of algorithms, the optimizer's state
_FAILED: list[torch.cuda.CUDAGraph] = []  # PyTorch 2.11's allocator of pinned memory keeps pointers to them


def why_not(recipe: Recipe, world: World, precision: Precision) -> str | None:
    """Why the steps of a resolved recipe cannot be replayed; None if they can."""
    model = recipe.model
    reasons = (
        (world.device.type != "cuda", "there is no GPU"),
        (model.arch != "deit", f"{model.arch} draws its stochastic depth from PyTorch's generator"),
    )
    return next((reason for applies, reason in reasons if applies), None)


def why_update_stays_out(recipe: Recipe, precision: Precision) -> str | None:
    """Why a graph of the steps of a resolved recipe ends before the update; None if it holds the update too."""
    reasons = (
        (precision.name == "fp16", "fp16's loss scale skips steps"),
        (recipe.optim.name != "adamw", f"{recipe.optim.name} takes its learning rate from the host"),
        (recipe.run.loss_sync == "every_step", "run.loss_sync 'every_step' reads each loss before it"),
    )
    return next((reason for applies, reason in reasons if applies), None)


def choose_graphs(recipe: Recipe, world: World, precision: Precision) -> tuple[bool, str]:
    """Whether the steps of a run are replayed, and why.

    Raises UserError if `run.cuda_graphs` is "on" and they cannot be replayed.
    """
    how, reason = recipe.run.cuda_graphs, why_not(recipe, world, precision)
    if how == "on" and reason is not None:
        raise UserError(f"run.cuda_graphs 'on' is not available here: {reason}. Set it to 'auto'")
    if how != "auto":
        return how == "on", "as requested"
    if reason is None and world.size > 1:
        reason = "a graph of several processes has not run on several GPUs yet: --run.cuda_graphs on tries it"
    if reason is not None:
        return False, reason
    beside = why_update_stays_out(recipe, precision)
    return True, "nothing in a step waits for the host" if beside is None else f"without the update: {beside}"


class RecordingError(UserError):
    """A step cannot be recorded as a CUDA graph; `reason` is CUDA's."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"a step cannot be recorded as a CUDA graph ({reason}): set --run.cuda_graphs off")
        self.reason = reason


class Recorder(Protocol):
    """Runs and records a function: see `CudaRecorder`."""

    def run(self, function: Callable[[], Tensor]) -> Tensor: ...

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]: ...

    def discard(self) -> None: ...


class CudaRecorder:
    """Records a CUDA graph on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._pool = (0, 0)

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """Run `function` on the recording stream: libraries keep workspace memory for each stream."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            out = function()
        current.wait_stream(self._stream)
        return out

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """A call that replays `function` on the current stream, and the tensor that each replay writes.

        Recording does not run `function`. Raises RecordingError if CUDA refuses, runs out of memory, or `function`
        raises; call `discard` then.
        """
        current = torch.cuda.current_stream()
        self._graph, self._pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        # Other threads may allocate, copy and query events meanwhile: the one that prepares batches, and NCCL's.
        mode = "thread_local"
        try:
            with torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
                out = function()
        except Exception as error:  # a compiler's too: all processes must agree to go on without the graph
            torch.cuda.set_stream(current)  # PyTorch leaves the recording stream in place
            _end_recording(self._pool)
            _FAILED.append(self._graph)
            # The error that ends a recording only says that there was one before.
            raise RecordingError(fact(error.__context__ or error)) from error
        release_before_leaving(self._graph)
        return self._graph.replay, out

    def discard(self) -> None:
        """Free the graph, and the memory that a recording reserved. Nothing may refer to its tensors any more."""
        if self._graph is None:
            return
        self._graph.reset()
        gc.collect()  # the error's traceback may have held tensors
        torch.cuda.empty_cache()
        held = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == tuple(self._pool)]
        if held and not any(segment["active_size"] for segment in held):
            # A recording that failed keeps its memory reserved up to PyTorch 2.13 (its pull request 190348).
            with suppress(RuntimeError):
                torch._C._cuda_releasePool(torch.cuda.current_device(), self._pool)
            torch.cuda.empty_cache()


def _end_recording(pool: tuple[int, int]) -> None:
    """Tell PyTorch's allocator and random generator that a recording into `pool` has failed.

    PyTorch 2.11 believes that it goes on (its pull request 180395): emptying the cache would then end the process.
    """
    device = torch.cuda.current_device()
    with suppress(RuntimeError):  # later versions have done it
        torch._C._cuda_endAllocateToPool(device, pool)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())


class Replayed:
    """Runs a function `WARM_UP` times without a graph, then records it and replays the graph.

    function  takes a call's tensors (or None) from memory that never moves; it returns a tensor and never makes the
              host wait
    agree     takes why this process cannot record, or None; returns why any process cannot, the same on all of them

    Raises ValueError if a call's tensors differ in shape or dtype from the first call's, and RecordingError on every
    process if one of them cannot record the function, which has not run then; call `discard`.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Tensor | None]], Tensor],
        recorder: Recorder,
        agree: Callable[[str | None], str | None] = lambda reason: reason,
    ) -> None:
        self._function, self._recorder, self._agree = function, recorder, agree
        self._static: list[Tensor | None] = []
        self._recorded: tuple[Callable[[], object], Tensor] | None = None
        self._calls = 0

    def __call__(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The function's result, in memory of its own."""
        self._take(tensors)
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._recorder.run(self._run).clone()
        if self._recorded is None:
            self._recorded = self._record()
        replay, out = self._recorded
        replay()
        return out.clone()

    def discard(self) -> None:
        """Free the memory of the recording, and of the calls' tensors."""
        self._recorded, self._static = None, []
        self._recorder.discard()

    def _record(self) -> tuple[Callable[[], object], Tensor]:
        recorded, failure = None, None
        try:
            recorded = self._recorder.record(self._run)
        except RecordingError as error:
            failure = error
        reason = self._agree(None if failure is None else failure.reason)
        if recorded is None or reason is not None:
            raise RecordingError(reason or "") from failure
        return recorded

    def _run(self) -> Tensor:
        return self._function(self._static)

    def _take(self, tensors: Sequence[Tensor | None]) -> None:
        if not self._calls:
            self._static = [None if tensor is None else tensor.clone() for tensor in tensors]
            return
        forms = [[None if t is None else (t.shape, t.dtype) for t in side] for side in (self._static, tensors)]
        if forms[0] != forms[1]:
            raise ValueError(f"the step was recorded for tensors {forms[0]}, not {forms[1]}: set run.cuda_graphs 'off'")
        for static, tensor in zip(self._static, tensors, strict=True):
            if static is not None and tensor is not None:
                static.copy_(tensor, non_blocking=True)
