"""The processes of a run: several under torchrun, or one."""

import contextlib
import os
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from fastdeit import launch
from fastdeit.pipelines.errors import UserError

T = TypeVar("T")

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
def world(device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs), or run alone.

    Raises UserError if `device` is "cuda" without a GPU, if there are fewer GPUs than processes, or if a launcher other
    than torchrun started several processes.
    """
    launch.check_launch()
    rank, size = launch.rank(), launch.size()
    local_rank, local_size = (
        int(os.environ.get("LOCAL_RANK", 0)),
        int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU ({torch.cuda.device_count()} found): "
            f"start fewer processes, or set --run.device cpu"
        )
    target = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(target)
    if size > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=target if cuda else None)
    try:
        yield World(rank, size, local_size, target)
    finally:
        if size > 1:
            release_graphs()
            dist.destroy_process_group()
