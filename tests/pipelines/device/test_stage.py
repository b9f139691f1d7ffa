"""The device stage against the host stage, which is tested against PIL, timm and torchvision: to the bit."""

import dataclasses

import numpy as np
import pytest
import torch

from fastdeit.pipelines.device.packing import fill_table
from fastdeit.pipelines.device.stage import DeviceStage
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.host.stage import HostStage
from fastdeit.pipelines.plan.plan import CODE, CUTMIX, MIXUP, NO_MIX, OPS, evaluation_plan
from operators import assert_same_batch, never_waiting

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(17, 21), (26, 15), (13, 24), (1, 1), (30, 3), (2, 20), (12, 12), (18, 9)]


def host_stage(pool, size, dtype=torch.float32):
    return HostStage(size, MEAN, STD, pool=pool, threads=1, dtype=dtype)


def device_stage(device, size, **options):
    return DeviceStage(size, MEAN, STD, device=device, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "samples", "groups", "layers"), [(12, 24, 6, 2), (13, 12, 6, 3), (16, 8, 2, 2), (17, 12, 6, 4)]
)
def test_random_plans_equal_the_host_stage_to_the_bit(size, samples, groups, layers, pool, device, drawn):
    decoded, plan = drawn(size, SIZES, samples, size, groups=groups, layers=layers)
    assert_same_batch(device_stage(device, size)(decoded, plan), host_stage(pool, size)(decoded, plan))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_every_operation_equals_the_host_stage_to_the_bit(name, pool, device, make_decoded, make_plan, draw_arg):
    rng = np.random.default_rng(CODE[name])
    decoded = make_decoded(rng, [(14, 14), (20, 11)], 4)
    plan = make_plan(rng, decoded, 14, groups=4, layers=1, erase=0.0)
    plan = dataclasses.replace(
        plan,
        op=np.full((4, 1), CODE[name], np.int8),
        arg=np.array([[draw_arg(rng, name)] for _ in range(4)]),
        interp=np.array([[2], [3], [2], [3]], np.int8),
        mix=np.full(4, NO_MIX, np.int8),
    )
    assert_same_batch(device_stage(device, 14)(decoded, plan), host_stage(pool, 14)(decoded, plan))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [224, 384])
def test_random_plans_equal_the_host_stage_at_full_size(size, pool, device, make_decoded, make_plan):
    rng = np.random.default_rng(size)
    decoded = make_decoded(rng, [(375, 500), (500, 333), (224, 224), (150, 400), (1200, 1600), (64, 2000)], 256)
    stage, host = device_stage(device, size), host_stage(pool, size)
    for layers in (2, 4):
        plan = make_plan(rng, decoded, size, groups=4, layers=layers)
        assert_same_batch(stage(decoded, plan), host(decoded, plan))
    expected = host(decoded, plan)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = dataclasses.replace(expected, images=expected.images.to(dtype))
        assert_same_batch(device_stage(device, size, dtype=dtype)(decoded, plan), narrow)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_the_float32_batch_rounded(dtype, pool, device, drawn):
    decoded, plan = drawn(1, SIZES, 4, 8, groups=2)
    full = host_stage(pool, 8)(decoded, plan).images
    if dtype is torch.bfloat16 and device.type == "cpu":  # Triton's interpreter cuts off
        full = (full.view(torch.int32) & -65536).view(torch.float32)
    assert torch.equal(device_stage(device, 8, dtype=dtype)(decoded, plan).images.cpu(), full.to(dtype))


@pytest.mark.slow
def test_layouts_hold_the_same_values(pool, device, drawn):
    decoded, plan = drawn(2, SIZES, 4, 8, groups=2)
    images = host_stage(pool, 8)(decoded, plan).images
    nhwc = device_stage(device, 8, layout="nhwc")(decoded, plan).images.cpu()
    assert torch.equal(nhwc, images.permute(0, 2, 3, 1))
    patches = device_stage(device, 8, layout="patches", patch_size=4)(decoded, plan).images.cpu()
    assert torch.equal(patches, torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "crop"), [(16, 0.875), (15, 1.0)])
def test_evaluation_equals_the_host_stage_to_the_bit(size, crop, pool, device, make_decoded):
    rng = np.random.default_rng(size)
    decoded = make_decoded(rng, [(30, 41), (41, 30), (18, 18), (9, 8), (12, 50), (60, 11)], 6)
    decoded = dataclasses.replace(decoded, source=np.arange(6, dtype=np.int32))
    plan = evaluation_plan(decoded.index, decoded.height, decoded.width, size, crop)
    assert_same_batch(device_stage(device, size)(decoded, plan), host_stage(pool, size)(decoded, plan))


@pytest.mark.slow
def test_targets_are_those_of_the_host_stage(pool, device, drawn):
    decoded, plan = drawn(3, SIZES, 6, 4, groups=3, layers=0)
    plan = dataclasses.replace(plan, mix=np.array([NO_MIX, MIXUP, CUTMIX], np.int8))
    ours, host = device_stage(device, 4)(decoded, plan), host_stage(pool, 4)(decoded, plan)
    assert torch.equal(ours.targets(10, 0.1).cpu(), host.targets(10, 0.1))


@pytest.mark.slow
def test_pixels_outside_the_decoded_region_change_nothing(pool, device, drawn):
    decoded, plan = drawn(4, [(30, 40), (40, 30)], 4, 12, groups=2)
    crop = np.array([[5, 6, 14, 17]] * 2 + [[8, 3, 20, 12]] * 2, np.int32)
    source = np.array([0, 0, 1, 1], np.int32)
    decoded = dataclasses.replace(decoded, source=source, region=crop[::2])
    plan = dataclasses.replace(plan, crop=crop)
    before = device_stage(device, 12)(decoded, plan)
    pixels = np.full_like(decoded.pixels, 77)
    garbled = dataclasses.replace(decoded, pixels=pixels)
    for slot, (top, left, height, width) in enumerate(crop[::2]):
        box = slice(top, top + height), slice(left, left + width)
        garbled.image(slot)[box] = decoded.image(slot)[box]
    assert_same_batch(device_stage(device, 12)(garbled, plan), before)


@pytest.mark.slow
def test_a_batch_is_not_overwritten_by_those_that_follow(pool, device, make_decoded, make_plan):
    rng = np.random.default_rng(5)
    stage, host = device_stage(device, 6), host_stage(pool, 6)
    batches = []
    for count in (4, 2, 6, 4):
        decoded = make_decoded(rng, SIZES, count)
        plan = make_plan(rng, decoded, 6, groups=1, layers=1)
        batches.append((stage(decoded, plan), host(decoded, plan)))
    for ours, expected in batches:
        assert_same_batch(ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "groups"), [(1, 1), (9, 3), (6, 1)])
def test_what_does_not_mix_need_not_be_paired(samples, groups, pool, device, drawn):
    decoded, plan = drawn(samples, SIZES, samples, 7, groups=groups, layers=1)
    plan = dataclasses.replace(plan, mix=np.full(groups, NO_MIX, np.int8), lam=np.ones(groups))
    assert_same_batch(device_stage(device, 7)(decoded, plan), host_stage(pool, 7)(decoded, plan))


def test_an_empty_batch(pool, device, make_decoded, make_plan):
    decoded = make_decoded(np.random.default_rng(6), SIZES, 0)
    plan = make_plan(np.random.default_rng(6), decoded, 8, groups=1)
    plan = dataclasses.replace(plan, mix=np.zeros(0, np.int8), lam=np.zeros(0), box=np.zeros((0, 4), np.int32))
    assert device_stage(device, 8)(decoded, plan).images.shape == (0, 3, 8, 8)


@pytest.mark.slow
def test_memory_grows_for_larger_batches_only(device, make_decoded, make_plan):
    rng = np.random.default_rng(7)
    stage = device_stage(device, 6)
    decoded = make_decoded(rng, [(8, 8)], 2)
    plan = make_plan(rng, decoded, 6, layers=1)
    for _ in range(2):
        stage(decoded, plan)
    settled = stage.growths
    assert settled > 0
    for _ in range(2):
        stage(decoded, plan)
    assert stage.growths == settled
    larger = make_decoded(rng, [(16, 16)], 4)
    stage(larger, make_plan(rng, larger, 6, layers=1))
    assert stage.growths > settled


@pytest.mark.slow
def test_writes_where_it_is_told_to(pool, device, drawn):
    decoded, plan = drawn(8, SIZES, 4, 6)
    out = torch.full((4, 3, 6, 6), float("nan"), device=device)
    assert device_stage(device, 6)(decoded, plan, out=out).images is out
    assert torch.equal(out.cpu(), host_stage(pool, 6)(decoded, plan).images)
    with pytest.raises(ValueError, match=r"out is \(3, 3, 6, 6\).*give it contiguous \(4, 3, 6, 6\)"):
        device_stage(device, 6)(decoded, plan, out=out[:3])


def test_a_plan_that_does_not_fit_is_refused_by_index(device, drawn):
    decoded, plan = drawn(9, SIZES, 4, 6)
    plan.crop[2] = 0, 0, 100, 1
    with pytest.raises(ValueError, match=f"dataset index {plan.index[2]} .* is cropped outside its image"):
        device_stage(device, 6)(decoded, plan)


def test_a_crop_beyond_32_bits_is_refused_by_index(device, drawn):
    """715 million pixels; none of them exists."""
    decoded, plan = drawn(13, [(20, 20)], 4, 6)
    height, width = 27000, 26600
    pixels = np.broadcast_to(np.uint8(7), height * width * 3)
    sizes = {"height": np.array([height], np.int32), "width": np.array([width], np.int32)}
    decoded = dataclasses.replace(decoded, pixels=pixels, **sizes)
    plan.crop[2] = 0, 0, height, 10
    with pytest.raises(UserError, match=f"dataset index {plan.index[2]} .* is cropped from 2154600000 bytes"):
        device_stage(device, 6)(decoded, plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"layout": "chw"}, "'chw'"),
        ({"layout": "patches", "patch_size": 5}, "img_size 12 is not a multiple of the patch size 5"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, message, device):
    with pytest.raises(ValueError, match=message):
        device_stage(device, 12, **options)


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="need a CUDA device"):
        device_stage("cpu", 12)


@pytest.mark.gpu
def test_pixels_may_be_pinned_or_on_the_device_already(pool, device, make_decoded, make_plan):
    rng = np.random.default_rng(10)
    stage, host = device_stage(device, 64), host_stage(pool, 64)
    for _ in range(6):
        decoded = make_decoded(rng, [(90, 120), (64, 70)], 16)
        plan = make_plan(rng, decoded, 64, groups=2)
        pixels = torch.from_numpy(decoded.pixels)
        for given in (decoded.pixels, pixels.pin_memory().numpy(), pixels.to(device)):
            assert_same_batch(stage(dataclasses.replace(decoded, pixels=given), plan), host(decoded, plan))
    assert stage.passed_on == 6


@pytest.mark.gpu
def test_many_batches_in_a_row_wait_for_nothing(pool, device, make_decoded, make_plan):
    rng = np.random.default_rng(11)
    stage, host = device_stage(device, 96), host_stage(pool, 96)
    inputs = []
    for _ in range(12):
        decoded = make_decoded(rng, [(190, 220), (164, 170)], 64)
        decoded = dataclasses.replace(decoded, pixels=torch.from_numpy(decoded.pixels).pin_memory().numpy())
        inputs.append((decoded, make_plan(rng, decoded, 96, groups=2)))
    for pair in inputs[:3]:
        stage(*pair)
    with never_waiting():
        batches = [stage(*pair) for pair in inputs]
    for batch, pair in zip(batches, inputs, strict=True):
        assert_same_batch(batch, host(*pair))


@pytest.mark.gpu
def test_the_launches_can_be_a_cuda_graph(pool, device, make_decoded, make_plan):
    rng = np.random.default_rng(12)
    stage, host, size, count = device_stage(device, 64), host_stage(pool, 64), 64, 32
    decoded = make_decoded(rng, [(90, 120), (64, 70)], count)
    plans = [make_plan(rng, decoded, size, groups=2) for _ in range(3)]
    for plan in plans:
        plan.op[plan.op == CODE["GaussianBlur"]] = 0
        stage(decoded, plan)
    table, passes, images = stage._prepare(decoded, plans[0], None)
    stage._uploads.end()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in passes.values():
            launch()
    for plan in plans:
        filled = torch.empty(len(table), dtype=torch.uint8)
        fill_table(filled, decoded, plan)
        table.copy_(filled)
        graph.replay()
        assert torch.equal(images.cpu(), host(decoded, plan).images)
