"""A training step as one CUDA graph: recorded once, then replayed with a single launch.

The graph holds the whole step: teacher, student, loss, backward pass, clipping, update, average. The networks in it are
those that torch.compile made. Its own "reduce-overhead" graphs end at a network's border, leave out the update, and
copy each network's inputs once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastdeit.config import Recipe
from fastdeit.distributed import World
from fastdeit.pipelines.errors import UserError, fact
from fastdeit.precision import Precision

WARM_UP = 3  # steps before the recording: compilation, choice of algorithms, the optimizer's state


def why_not(recipe: Recipe, world: World, precision: Precision) -> str | None:
    """Why the steps of a resolved recipe cannot be replayed; None if they can."""
    model, run = recipe.model, recipe.run
    reasons = (
        (world.device.type != "cuda", "there is no GPU"),
        (world.size > 1, "several processes share their gradients"),
        (precision.name == "fp16", "fp16 has a loss scale, which skips steps"),
        (recipe.optim.name == "sgd", "SGD takes its learning rate from the host"),
        (run.loss_sync == "every_step", "run.loss_sync 'every_step' reads each loss before the update"),
        (model.arch != "deit", f"{model.arch} draws its stochastic depth from PyTorch's generator"),
        (model.drop_path_mode == "skip", "drop_path_mode 'skip' changes tensor sizes in every step"),
        (model.drop_rate > 0, "dropout draws from PyTorch's generator"),
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
    return reason is None, reason or "nothing in a step waits for the host"


class Recorder(Protocol):
    """Runs and records a function: see `CudaRecorder`."""

    def run(self, function: Callable[[], Tensor]) -> Tensor: ...

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]: ...


class CudaRecorder:
    """Records CUDA graphs on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

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

        Recording does not run `function`. Raises UserError if CUDA refuses, or runs out of memory.
        """
        graph = torch.cuda.CUDAGraph()
        # The thread that prepares batches may allocate and copy meanwhile.
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                out = function()
        except RuntimeError as error:
            raise UserError(
                f"a step cannot be recorded as a CUDA graph ({fact(error)}): set --run.cuda_graphs off"
            ) from error
        return graph.replay, out


class Replayed:
    """Runs a function `WARM_UP` times without a graph, then records it and replays the graph.

    function  takes a call's tensors (or None) from memory that never moves; it returns a tensor and never makes the
              host wait

    Raises ValueError if a call's tensors differ in shape or dtype from the first call's.
    """

    def __init__(self, function: Callable[[Sequence[Tensor | None]], Tensor], recorder: Recorder) -> None:
        self._function, self._recorder = function, recorder
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
            self._recorded = self._recorder.record(self._run)
        replay, out = self._recorded
        replay()
        return out.clone()

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
