"""The sum of partial sums against PyTorch's, in float64."""

import pytest
import torch

from fastdeit.kernels.column_sum import column_sum

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("shape", [(2, 1), (5, 17), (256, 16), (257, 2, 24), (512, 2, 192), (1000, 33)])
def test_equals_pytorch(device, shape):
    partial = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    out = torch.full(shape[1:], float("nan"), device=device)
    column_sum(partial, out)
    torch.testing.assert_close(out.double(), partial.double().sum(0), rtol=1e-6, atol=5e-5)
    again = torch.full_like(out, float("nan"))
    column_sum(partial, again)
    assert torch.equal(out, again)
