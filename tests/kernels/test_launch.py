"""Launches from several threads: a batch is made in one while a step runs in another."""

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from fastdeit.kernels.bias_gelu import bias_gelu
from fastdeit.kernels.layer_norm import layer_norm


def test_two_threads_may_launch_at_once(device):
    x = torch.randn(8, 48, device=device)
    weight, bias = torch.randn(2, 48, device=device)

    def gelu(_):
        return bias_gelu(x, bias)

    def norm(_):
        return layer_norm(x, weight, bias, 1e-6)

    with ThreadPoolExecutor(2) as pool:
        found = [pool.map(function, range(12)) for function in (gelu, norm)]
        for out in found[0]:
            torch.testing.assert_close(out, F.gelu(x + bias), rtol=1e-5, atol=1e-5)
        for out in found[1]:
            torch.testing.assert_close(out, F.layer_norm(x, (48,), weight, bias, 1e-6), rtol=1e-4, atol=1e-5)


def test_an_operator_runs_on_the_device_of_its_tensors(device, monkeypatch):
    entered, device_of = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: entered.append(tensor.shape) or device_of(tensor))
    x = torch.randn(2, 48, device=device, requires_grad=True)
    bias_gelu(x, torch.zeros(48, device=device)).sum().backward()
    assert entered == [(2, 48), (2, 48)]  # forward, backward
