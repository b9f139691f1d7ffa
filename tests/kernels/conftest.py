"""What the tests of kernels share: where they run, poisoned memory, and the measure of an error."""

import pytest
import torch

from operators import results


@pytest.fixture
def on_gpu():
    return torch.cuda.is_available()


@pytest.fixture
def poisoned():
    """PyTorch fills memory that it hands out with NaN: what a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def at_most_twice():
    """Fails where the error of `ours` against float64 is more than twice that of PyTorch's op in the same dtype.

    Compares the largest error and the root mean square, relative to the largest magnitude. An error up to the dtype's
    epsilon passes. In float32 the limits are four times PyTorch's error and two epsilons: there the error is that of
    the order of a sum, in which PyTorch's own kernels differ from each other as much.
    """

    def check(ours, pytorch, exact, name=""):
        assert ours.dtype == pytorch.dtype, name
        assert ours.shape == exact.shape, name
        if not exact.numel():
            return
        size = exact.abs().max().item() or 1.0
        times, epsilons = (4, 2) if ours.dtype is torch.float32 else (2, 1)
        floor = epsilons * torch.finfo(ours.dtype).eps
        for norm in (lambda e: e.abs().max(), lambda e: e.square().mean().sqrt()):
            mine, judge = (norm(t.double() - exact).item() / size for t in (ours, pytorch))
            assert mine <= max(times * judge, floor), f"{name}: error {mine:.2e}, PyTorch's own {judge:.2e}"

    return check


@pytest.fixture
def equals_pytorch(at_most_twice):
    """Fails where outputs or gradients of `ours` are further from float64 than `at_most_twice` lets them be.

    names  of the outputs and of the arguments that have gradients
    Returns our outputs and gradients.
    """

    def check(ours, pytorch, arguments, names):
        exact = [a.detach().double().requires_grad_() if a is not None and a.requires_grad else a for a in arguments]
        outputs = pytorch(*exact)
        generator = torch.Generator().manual_seed(9)
        weights = [  # numbers that every dtype has
            torch.randn(output.shape, generator=generator).bfloat16().float().to(output.device)
            for output in (outputs if isinstance(outputs, tuple) else (outputs,))
        ]
        sides = [results(f, a, weights) for f, a in ((ours, arguments), (pytorch, arguments), (pytorch, exact))]
        for name, mine, judge, truth in zip(names, *sides, strict=True):
            at_most_twice(mine, judge, truth, name)
        return sides[0]

    return check
