"""Numbers on their way to the host."""

import pytest
import torch

from fastdeit.distributed import world
from fastdeit.training.meter import Meter, PendingNumbers
from fastdeit.training.objective import LossParts


def test_a_number_of_the_cpu_is_there():
    assert PendingNumbers(torch.tensor([2.5, 3])).tolist() == [2.5, 3]


def test_a_window_is_the_mean_of_its_steps():
    with world("cpu") as joined:
        meter = Meter(joined)
        meter.start(0.0)
        for loss in (1.0, 2.0, 6.0):
            meter.add(LossParts(torch.tensor(loss), torch.tensor(loss + 1), torch.tensor(0.5)))
        window = meter.read(0.0, 8)
        assert window.losses.tolist() == [3.0, 4.0, 0.5]
        assert window.images_per_second > 0
        meter.add(LossParts(*torch.tensor([4.0, 5.0, 6.0])))
        assert meter.read(0.0, 8).losses.tolist() == [4.0, 5.0, 6.0]


@pytest.mark.gpu
def test_a_number_arrives_without_waiting_for_later_work():
    number = torch.ones(1, device="cuda") * 3
    torch.cuda.synchronize()
    pending = PendingNumbers(number)
    number.fill_(4)
    torch.cuda._sleep(2_000_000_000)  # about a second
    ended = torch.cuda.Event()
    ended.record()
    assert pending.tolist() == [3]
    assert not ended.query()
    torch.cuda.synchronize()
