"""PyTorch's operators on one thread: two on the busy cores of a small machine wait for each other."""

import torch

torch.set_num_threads(1)
