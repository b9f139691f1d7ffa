"""Outputs and gradients of an operator, batches of images, and a GPU that nothing waits for."""

import contextlib
import dataclasses

import torch


def results(function, arguments, weights):
    """The outputs, and the gradients of the arguments that want one; the loss is the weighted sum of the outputs."""
    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [a for a in arguments if a is not None and a.requires_grad]
    weights = [weight.to(output.dtype) for weight, output in zip(weights, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


class Scale(torch.nn.Module):
    """Multiplies by a factor."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def assert_same_bits(ours, theirs):
    for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(one, other), place


def assert_same_batch(ours, theirs):
    """Two batches of images, wherever they lie, are the same to the bit."""
    for field in dataclasses.fields(theirs):
        one, other = (getattr(batch, field.name).cpu() for batch in (ours, theirs))
        assert one.dtype == other.dtype, field.name
        samples = [sample for sample, pair in enumerate(zip(one, other, strict=True)) if not torch.equal(*pair)]
        assert torch.equal(one, other), f"{field.name}: samples {samples}"


@contextlib.contextmanager
def never_waiting():
    """Once all that the GPU was given is done, the host may not wait for it any more."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
