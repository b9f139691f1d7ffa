"""Numbers on their way to the host."""

import pytest
import torch

from fastdeit.meter import OnItsWay


def test_a_number_of_the_cpu_is_there():
    assert OnItsWay(torch.tensor(2.5)).value() == 2.5


@pytest.mark.gpu
def test_a_number_arrives_without_waiting_for_later_work():
    number = torch.ones((), device="cuda") * 3
    torch.cuda.synchronize()
    way = OnItsWay(number)
    number.fill_(4)
    torch.cuda._sleep(2_000_000_000)  # about a second
    ended = torch.cuda.Event()
    ended.record()
    assert way.value() == 3
    assert not ended.query()
    torch.cuda.synchronize()
