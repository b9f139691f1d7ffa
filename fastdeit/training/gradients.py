"""The gradients of several processes, summed while the backward pass runs.

DistributedDataParallel does this too. A CUDA graph holds this form with fewer launches, from the first step on, and
nothing of a recording that fails stays behind: see docs/design.md, "Several processes".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 16 * 2**20  # bytes that are summed at once
ALIGNED = 32  # elements; a view starts at a multiple, so that kernels can load it in the widest words


@dataclass(frozen=True)
class Bucket:
    """Parameters whose gradients are summed at once.

    flat   (elements,) of the parameters' dtype, zero between the views
    views  for each parameter its part of `flat`, in its shape and its order of dimensions
    """

    names: list[str]
    parameters: list[nn.Parameter]
    flat: Tensor
    views: list[Tensor]

    @classmethod
    def of(cls, named: list[tuple[str, nn.Parameter]]) -> Bucket:
        names, parameters = [name for name, _ in named], [parameter for _, parameter in named]
        sizes = [-(-p.numel() // ALIGNED) * ALIGNED for p in parameters]
        flat = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        parts = flat.split(sizes)
        views = [part.as_strided(p.shape, _dense(p)) for part, p in zip(parts, parameters, strict=True)]
        return cls(names, parameters, flat, views)


class SharedGradients:
    """Sums the gradients of all processes of the default group.

    Gradients are collected in buckets, in the order in which a backward pass makes them. Each bucket takes one copy and
    one all-reduce, which starts as soon as the bucket and all buckets before it are full. All processes thus sum in the
    same order, and the sum has the same bits on each.

    named      all parameters that are trained, with their names, in the order of the forward pass
    processes  number of processes; for the mean, divide the loss by it
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], bucket_bytes: int = BUCKET) -> None:
        self.processes = dist.get_world_size()
        trained = [(name, p) for name, p in named if p.requires_grad]
        self._buckets = [Bucket.of(part) for part in _split(trained[::-1], bucket_bytes)]
        self._bucket_of: dict[Tensor, int] = {
            parameter: number for number, bucket in enumerate(self._buckets) for parameter in bucket.parameters
        }
        self._missing: list[int] = []  # gradients that each bucket waits for; empty outside `summing`
        self._sums: list[Any] = []  # all-reduces under way, one for each bucket that is full
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(self._take)

    @contextmanager
    def summing(self) -> Iterator[None]:
        """Sum the gradients, which the backward pass inside completes. Afterwards they are the same on all processes.

        Backward passes outside add to the gradients of this process alone. Raises RuntimeError if a parameter has no
        gradient at the end. After any error, the gradients are undefined; the next step starts afresh.
        """
        self._missing = [len(bucket.parameters) for bucket in self._buckets]
        self._sums = []
        try:
            yield
            while len(self._sums) < len(self._buckets):  # some parameters were used in earlier passes only
                self._sum(self._buckets[len(self._sums)])
            for work in self._sums:
                work.wait()  # on a GPU the stream waits, not the host
        except Exception:
            for work in self._sums:  # they write to the buckets of the next step
                with suppress(RuntimeError):
                    work.wait()
            raise
        finally:
            self._missing, self._sums = [], []

    def _take(self, parameter: Tensor) -> None:
        """Called by autograd once a parameter's gradient is complete."""
        if not self._missing:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        while len(self._sums) < len(self._buckets) and not self._missing[len(self._sums)]:
            self._sum(self._buckets[len(self._sums)])

    @torch.no_grad()
    def _sum(self, bucket: Bucket) -> None:
        gradients = [
            _laid_out(p.grad, view)
            for p, view in zip(bucket.parameters, bucket.views, strict=True)
            if p.grad is not None
        ]
        if len(gradients) < len(bucket.parameters):
            name = next(n for n, p in zip(bucket.names, bucket.parameters, strict=True) if p.grad is None)
            raise RuntimeError(f"the loss does not depend on {name}, so it has no gradient that processes could share")
        torch._foreach_copy_(bucket.views, gradients)
        self._sums.append(dist.all_reduce(bucket.flat, async_op=True))
        for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
            parameter.grad = view


def _split(named: list[tuple[str, nn.Parameter]], bucket_bytes: int) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """`named` in runs of one dtype, each of about `bucket_bytes` or of one parameter."""
    run: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in named:
        if run and (size + parameter.nbytes > bucket_bytes or parameter.dtype != run[0][1].dtype):
            yield run
            run, size = [], 0
        run.append((name, parameter))
        size += parameter.nbytes
    if run:
        yield run


def _dense(parameter: Tensor) -> tuple[int, ...]:
    """Strides in which autograd lays out the parameter's gradient: without gaps, dimensions in the same order."""
    return torch.empty_like(parameter, device="meta", memory_format=torch.preserve_format).stride()


def _laid_out(gradient: Tensor, view: Tensor) -> Tensor:
    """The gradient with the strides of `view`, which may differ where a dimension has one element.

    A single pair of tensors with different strides would make PyTorch copy every tensor of a list by itself.
    """
    same = gradient.is_contiguous() and view.is_contiguous()
    return gradient.as_strided(view.shape, view.stride()) if same else gradient
