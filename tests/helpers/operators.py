"""Outputs and gradients of an operator."""

import torch


def results(function, arguments, weights):
    """The outputs, and the gradients of the arguments that want one; the loss is the weighted sum of the outputs."""
    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [a for a in arguments if a is not None and a.requires_grad]
    weights = [weight.to(output.dtype) for weight, output in zip(weights, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


def assert_same_bits(ours, theirs):
    for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(one, other), place
