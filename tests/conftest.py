"""Settings of the whole test run."""

import os

import torch

# PyTorch's operators on one thread: two on the busy cores of a small machine wait for each other.
torch.set_num_threads(1)
# Where there is no GPU, Triton's kernels run under its interpreter. It must know before they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
