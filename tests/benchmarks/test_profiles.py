"""Stored profiles: every kernel of a real step has a group, and nothing is counted twice or lost."""

import pytest

from benchmarks.profiles import (
    NAME_LENGTH,
    PROFILES,
    Kernel,
    by_group,
    kernels_of,
    newest,
    profile_record,
    profile_step,
    short_name,
)
from benchmarks.tables import read
from fastdeit.training.profiling import REST, group_of

RECORDS = read(PROFILES)


def test_every_kernel_of_the_stored_steps_has_a_group():
    assert {record["model"] for record in RECORDS} >= {"deit_tiny", "deit_small", "deit_base"}
    for record in RECORDS:
        kernels = kernels_of(record)
        assert [kernel.name for kernel in kernels if group_of(kernel.name) == REST] == []
        groups = by_group(kernels)
        assert sum(g.microseconds for g in groups.values()) == pytest.approx(sum(k.microseconds for k in kernels))
        assert sum(g.launches for g in groups.values()) == pytest.approx(sum(k.launches for k in kernels))
        # Three products for each linear layer: four a block, the patch embedding without one, the head.
        products = [k for k in kernels if group_of(k.name) == "GEMM" and "splitKreduce" not in k.name]
        assert sum(k.launches for k in products) == 3 * 48 + 2 + 3


def test_names_are_short_and_keep_what_tells_them_apart():
    long = (
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
        "FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4>>"
    )
    assert len(short_name(long)) <= NAME_LENGTH
    assert "FusedAdam" in short_name(long)
    assert group_of(short_name(long)) == group_of(long) == "optimizer"
    assert short_name("_attention_forward") == "_attention_forward"


def test_a_record_keeps_its_kernels():
    kernels = [Kernel("nvjet_a", 3.0, 41.237), Kernel("_column_sum", 0.5, 1.0)]
    record = profile_record({"model": "deit_tiny"}, "a form", kernels, 0.0125, {"date": "2026-01-01", "gpu": None})
    assert kernels_of(record) == [Kernel("nvjet_a", 3.0, 41.24), Kernel("_column_sum", 0.5, 1.0)]
    assert (record["ms_per_step"], record["form"], record["model"]) == (12.5, "a form", "deit_tiny")


def test_the_newest_record_of_a_card_is_found():
    def made(date, name, **case):
        return {"environment": {"date": date, "gpu": None if name is None else {"name": name}}, **case}

    records = [made("2", "NVIDIA H200", batch=8), made("1", "NVIDIA H200", batch=8), made("3", "NVIDIA H100", batch=8)]
    records.append(made("4", None, batch=8))
    assert newest(records, card="H200", batch=8) is records[0]
    assert newest(records, batch=8) is records[2]
    assert newest(records, card="H200", batch=9) is None


@pytest.mark.gpu
def test_kernels_of_a_replayed_graph_are_seen():
    import torch

    a, out = torch.randn(256, 256, device="cuda"), torch.empty(256, 256, device="cuda")
    torch.mm(a, a, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            torch.mm(a, a, out=out)
    kernels = profile_step(graph.replay, steps=4)
    assert sum(k.launches for k in kernels if group_of(k.name) == "GEMM") >= 3
    assert all(k.microseconds > 0 for k in kernels)
