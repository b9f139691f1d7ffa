"""Gradients that two processes share are those of PyTorch's DistributedDataParallel."""

import pytest
import torch

from steps import (
    in_two_processes,
    start_apart,
    sums_after_an_error,
    sums_and_ddp,
    sums_without_a_parameter,
    worlds_agree,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("passes", [1, 3])
def test_sums_are_ddps_to_the_bit(tmp_path, passes):
    """Convolutions in channels-last layout, two dtypes, small buckets, a parameter that only the first pass uses."""
    for result in in_two_processes(sums_and_ddp, tmp_path, passes):
        assert result["ours"].keys() == result["ddp"].keys()
        for name, value in result["ours"].items():
            assert torch.equal(value, result["ddp"][name]), name
            assert value.stride() == result["ddp"][name].stride()


def test_a_parameter_without_a_gradient_is_named(tmp_path):
    for message in in_two_processes(sums_without_a_parameter, tmp_path):
        assert "does not depend on 1.bias" in message


def test_an_error_in_a_backward_pass_leaves_nothing_behind(tmp_path):
    for result in in_two_processes(sums_after_an_error, tmp_path):
        assert all(torch.equal(a, b) for a, b in zip(*result, strict=True))


def test_processes_start_from_the_same_weights(tiny, tmp_path):
    """The weights and averages of the main process; other networks are an error on all."""
    first, second = in_two_processes(start_apart, tmp_path, [tiny(), tiny()])
    for kind in ("before", "after"):
        equal = [torch.equal(value, second[kind][name]) for name, value in first[kind].items()]
        assert all(equal) == (kind == "after")
    recipes = [tiny(), tiny(model={"depth": 1})]
    with pytest.raises(AssertionError, match="the processes hold different networks"):
        in_two_processes(start_apart, tmp_path, recipes)


def test_processes_agree_on_a_number_and_a_reason(tmp_path):
    for result in in_two_processes(worlds_agree, tmp_path):
        shared = result.pop("share")
        assert torch.equal(shared["model"].pop("a"), torch.tensor([[0.0, 3], [1, 4], [2, 5]]))
        assert torch.equal(shared["list"].pop(0), torch.tensor(True))
        assert shared == {"model": {}, "list": [None, (3, "x")], 4: 5}
        assert result == {
            "same": [True, False, False],
            "from_main": ("main", 0),
            "first": [None, "process 1: one", "process 0: zero"],
        }
