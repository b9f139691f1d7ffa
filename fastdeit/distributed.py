"""The processes of a run: several under torchrun, or one."""

import contextlib
import os
import re
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastdeit import launch
from fastdeit.joining import MINUTES, meet, open_store
from fastdeit.pipelines.errors import UserError
from fastdeit.signals import REQUEUE, lost_sentence
from fastdeit.watch import Watch

T = TypeVar("T")

# Seconds that a collective operation waits beyond the limit of `Watch`, which reports first because it can name the
# lost process.
_MARGIN = 30.0

_GRAPHS: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()


def release_before_leaving(graph: torch.cuda.CUDAGraph) -> None:
    """Make `world` free `graph` before it destroys the process group: NCCL waits for graphs with its launches."""
    _GRAPHS.add(graph)


def release_graphs() -> None:
    """Free the graphs of `release_before_leaving`; none of them can be replayed any more."""
    for graph in list(_GRAPHS):
        graph.reset()
    _GRAPHS.clear()


@dataclass(frozen=True)
class _Place:
    """Placeholder for a tensor in a state that is sent without its tensors."""

    shape: torch.Size
    dtype: torch.dtype


def _form(state: Any, tensors: list[torch.Tensor]) -> Any:
    """`state` with a `_Place` for each tensor; appends the tensors to `tensors` in the same order."""
    if isinstance(state, torch.Tensor):
        tensors.append(state)
        return _Place(state.shape, state.dtype)
    if isinstance(state, dict):
        return {key: _form(value, tensors) for key, value in state.items()}
    return type(state)(_form(value, tensors) for value in state) if isinstance(state, list | tuple) else state


@dataclass(frozen=True)
class World:
    """This process's rank, the number of processes, and its device."""

    rank: int
    size: int
    local_size: int  # processes on this machine
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over all processes (in place if there are several)."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def same(self, value: float) -> bool:
        """Whether `value` is equal on every process."""
        if self.size == 1:
            return True
        ends = torch.tensor([value, -value], dtype=torch.float64, device=self.device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        return bool(ends[0] == -ends[1])

    def first(self, text: str | None) -> str | None:
        """The text of the first process that has one, with its rank, on every process; None if no process has one."""
        if self.size == 1:
            return text
        texts = enumerate(self.gathered(text))
        return next((f"process {rank}: {found}" for rank, found in texts if found is not None), None)

    def gathered(self, value: T) -> list[T]:
        """The `value` of every process, by rank, on every process; it must be picklable."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """The main process's `value`, on every process; it must be picklable."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, 0, device=self.device)
        return values[0]

    def share(self, state: Any) -> Any:
        """The main process's `state` on every process: dicts, lists and tuples of tensors and picklable values.

        Tensors are sent one at a time, so a GPU holds only one of them; other processes receive them on the CPU. The
        `state` that other processes pass is ignored.
        """
        if self.size == 1:
            return state
        tensors: list[torch.Tensor] = []
        form = self.from_main(_form(state, tensors) if self.main else None)
        if self.main:
            for tensor in tensors:
                dist.broadcast(tensor.to(self.device).contiguous(), 0)
            return state
        return self._filled(form)

    def _filled(self, form: Any) -> Any:
        if isinstance(form, _Place):
            tensor = torch.empty(form.shape, dtype=form.dtype, device=self.device)
            dist.broadcast(tensor, 0)
            return tensor.cpu()
        if isinstance(form, dict):
            return {key: self._filled(value) for key, value in form.items()}
        return type(form)(map(self._filled, form)) if isinstance(form, list | tuple) else form

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite `tensors` with those of the main process."""
        if self.size > 1:
            for tensor in tensors:
                dense = tensor.contiguous()
                dist.broadcast(dense, 0)
                if dense is not tensor:
                    tensor.copy_(dense)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def world(device: str = "auto", minutes: float = MINUTES, facts: Mapping[str, str] | None = None) -> Iterator[World]:
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs), or run alone.

    minutes  how long a process may keep the others waiting before it counts as lost
    facts    what must be the same on all processes, by name; versions are compared as well

    Raises UserError if `device` is "cuda" without a GPU, if there are fewer GPUs than processes, if a launcher other
    than torchrun started several processes, if not all processes join, or if their versions or `facts` differ. If
    another process is lost, the program ends with status `REQUEUE` and a sentence that names it.
    """
    launch.check_launch()
    rank, size = launch.rank(), launch.size()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU ({torch.cuda.device_count()} found): "
            f"start fewer processes, or set --run.device cpu"
        )
    target = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(target)
    joined = World(rank, size, local_size, target)
    with _joined(joined, minutes, facts or {}) if size > 1 else contextlib.nullcontext():
        yield joined


@contextlib.contextmanager
def _joined(world: World, minutes: float, facts: Mapping[str, str]) -> Iterator[None]:
    """Join the process group of several processes, and watch them until the block ends."""
    meeting = meet(open_store(world.rank), world.rank, world.size, facts)
    for warning in meeting.warnings if world.main else ():
        print(f"warning: {warning}", file=sys.stderr)
    limit = timedelta(seconds=60 * minutes + _MARGIN)
    meeting.store.set_timeout(limit)
    watch, in_order, fell = Watch(meeting, world.rank, minutes, _begun), False, False
    cuda = world.device.type == "cuda"
    try:
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=meeting.store,
            rank=world.rank,
            world_size=world.size,
            timeout=limit,
            device_id=world.device if cuda else None,
        )
        yield
        in_order = True
    except RuntimeError as error:
        fell = _is_connection(error)
        if not fell:
            raise
        culprits = ", ".join(map(str, watch.gone())) or "another process"
        detail = re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0])  # without the position in gloo's source
        reason = f"{meeting.peers[world.rank]} has lost its connection to {culprits} ({detail})"
        print(lost_sentence(reason), file=sys.stderr)
        sys.exit(REQUEUE)
    finally:
        watch.close(in_order=in_order, fell=fell)
        release_graphs()
        if dist.is_initialized():
            dist.destroy_process_group()


def _begun() -> int:
    """How many collective operations this process has begun."""
    group = dist.group.WORLD
    if group is None:
        return 0
    try:
        return group._get_sequence_number_for_group()  # pyright: ignore[reportAttributeAccessIssue]
    except (AttributeError, RuntimeError):  # other PyTorch or backend: the operation's own timeout finds a hang
        return 0


def _is_connection(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another process is gone, or does not answer."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)
