"""A profile of a run that goes on: its tables add up, its trace opens, its run has the same bits."""

import gzip
import json

import pytest
import torch

from fastdeit.distributed import world
from fastdeit.pipelines.errors import UserError
from fastdeit.training.profiling import DISPATCH, REST, WARM_UP, Event, Profile, StepProfiler, group_of, room
from fastdeit.training.trainer import Trainer
from refusals import refused
from runs import newest, same_values, train, trained


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@pytest.mark.slow
def test_a_profiled_run_is_the_same_run(tiny, taught, tmp_path, events, capsys):
    options = {**taught, "data": {"val": None}}
    plain = tiny(**options, run={"epochs": 3, "output": tmp_path / "plain"})
    profiled = tiny(**options, run={"epochs": 3, "output": tmp_path / "profiled", "profile": 3})
    first, second = (trained(recipe)["model"] for recipe in (plain, profiled))
    assert same_values(first, second)
    folder = profiled.run.output
    (event,) = events(folder, "profile")
    # Five steps an epoch: after six of them, one that starts the tracing and three.
    assert (event["steps"], event["global_step"]) == (3, 10)
    parts = event["milliseconds"]
    assert {"GEMM", "attention", "loss", "optimizer", "average", "teacher"} <= set(parts)
    assert all(value >= 0 for value in parts.values())
    printed = capsys.readouterr().out
    assert "profile of 3 steps" in printed

    table = rows((folder / "profile.md").read_text())
    groups = {
        row[0]: (float(row[1]), float(row[2].rstrip("%"))) for row in table if len(row) == 3 and row[1][:1].isdigit()
    }
    assert sum(share for _, share in groups.values()) == pytest.approx(100, abs=1)
    assert groups["GEMM"][0] == pytest.approx(parts["GEMM"], abs=1e-3)
    longest = [row for row in table if len(row) == 5 and row[2][:1].isdigit()]
    assert 5 < len(longest) <= 15
    times = [float(row[3]) for row in longest]
    assert times == sorted(times, reverse=True)

    with gzip.open(folder / "profile.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    # PyTorch's own count of the ranges is the judge of how many steps were taken.
    assert names.count("fastdeit.optimizer") == 3
    assert names.count("fastdeit.teacher") == 3


def test_too_many_steps_are_refused_before_the_run(tiny):
    with world("cpu") as joined, pytest.raises(UserError, match="2 epochs of 5 steps leave 3 steps"):
        Trainer(tiny(run={"profile": 4}), joined)
    refused("0 or more", tiny, run={"profile": -1})


@pytest.mark.parametrize(("steps", "epochs"), [(5, 1), (5, 2), (8, 1), (9, 1), (9, 2), (3, 3), (3, 2), (1, 9)])
def test_the_room_is_what_a_run_can_take(tmp_path, steps, epochs):
    """Told to profile one step more than `room` says, a run ends without a profile; with as many it has one."""

    def found(count):
        profiler = StepProfiler(tmp_path, count, 1, torch.device("cpu"))
        return any(profiler.step(steps - 1 - number % steps, 0.0) for number in range(steps * epochs))

    most = room(steps, epochs)
    assert not found(most + 1)
    assert most == 0 or found(most)


@pytest.mark.slow
def test_a_run_without_room_left_says_so(tiny, capsys):
    recipe = tiny(run={"checkpoint_every": 2, "keep_checkpoints": 9}, data={"val": None})
    train(recipe)
    newest(recipe).unlink()
    train(tiny(run={"profile": 3}, data={"val": None}))
    assert "no profile: the run ended before 3 more steps" in capsys.readouterr().out
    assert not (recipe.run.output / "profile.md").exists()


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "GEMM"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_bias_TNT", "GEMM"),
        ("aten::addmm", "GEMM"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "sum over processes"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("_attention_backward_queries", "attention"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>",
            "optimizer",
        ),
        ("void multi_tensor_apply_kernel<TensorListMetadata<4>, AdamCapturableFunctor<float, float>>", "optimizer"),
        ("void at::native::multi_tensor_apply_kernel<TernaryOpScalarFunctor<float>, LerpFunctor<float>>", "average"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize64x64x64", "convolution"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("triton_per_fused_native_layer_norm_4", "LayerNorm"),
        ("_add_layer_norm_forward", "LayerNorm"),
        ("aten::native_layer_norm", "LayerNorm"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "GELU"),
        ("_bias_gelu_backward", "GELU"),
        ("_assemble_tokens_forward", "tokens"),
        ("_column_sum", "sums"),
        ("triton_red_fused_sum_view_10", "sums"),
        ("triton_red_fused_slice_sum_17", "sums"),
        ("triton_poi_fused__to_copy_t_5", "casts"),
        ("triton_poi_fused__to_copy_7", "casts"),
        ("triton_poi_fused__to_copy__unsafe_view_clone_permute_view_0", "copies"),
        ("triton_poi_fused_attention_backward_slice_backward_view_9", "element-wise"),
        ("triton_poi_fused_add_layer_norm_backward_slice_backward_view_13", "element-wise"),
        ("triton_poi_fused_add_12", "element-wise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "element-wise"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "GEMM"),
        ("Memset (Unknown)", "copies"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "sum over processes"),
        ("c10d::allreduce_", "sum over processes"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_64x64x64", "attention"),
        ("_normalize_erase_mix", "augmentation"),
        ("_taps", "augmentation"),
        ("_pixels", "augmentation"),
        ("_distillation_mean", "loss"),
        ("fastdeit::distillation_loss_backward", "loss"),
        ("void cunn_SoftMaxForward<8, float>", "loss"),
        ("something_new", REST),
    ],
)
def test_kernels_are_known_by_name(name, group):
    assert group_of(name) == group


def test_a_gpus_idle_time_is_what_no_kernel_covers(tmp_path):
    events = [Event("gemm", "GEMM", 0, 400_000), Event("copy", "copies", 300_000, 200_000)]
    found = Profile("a GPU", 2, 8, 1.0, 0.1, 0.5, events)
    assert found.groups() == {"device idle": 0.5, "GEMM": 0.4, "copies": 0.2}
    assert "250.000 | 50.0%" in found.table()
    host = Profile("the CPU", 2, 8, 1.0, 0.1, None, [*events, Event("", DISPATCH, 0, 9e9)])
    assert host.groups() == pytest.approx({"GEMM": 0.4, DISPATCH: 0.3, "copies": 0.2, "waiting for data": 0.1})


@pytest.mark.gpu
def test_on_a_gpu_graphs_are_looked_into(tmp_path):
    """Kernels of a replayed graph are counted by name."""
    a, out = torch.randn(256, 256, device="cuda"), torch.empty(256, 256, device="cuda")
    graph = torch.cuda.CUDAGraph()
    torch.mm(a, a, out=out)
    with torch.cuda.graph(graph):
        torch.mm(a, a, out=out)
    profiler = StepProfiler(tmp_path, 4, 1, torch.device("cuda", 0))
    found = None
    for number in range(WARM_UP + 5):
        graph.replay()
        found = profiler.step(100 - number, 0.0) or found
    assert found is not None
    assert sum(event.group == "GEMM" for event in found.events) >= 4
    assert 0 < found.busy <= found.wall
