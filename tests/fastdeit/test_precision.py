"""What a precision means to the process."""

import pytest
import torch

from fastdeit.precision import Precision, allow_tf32


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_float32_that_was_asked_for_is_never_cut_to_tf32(dtype):
    """Neither in a product nor in a convolution, whose TF32 is on by default."""
    torch.backends.cudnn.allow_tf32 = True
    allow_tf32(Precision("any", dtype, torch.device("cuda", 0)))
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (dtype is not None)
