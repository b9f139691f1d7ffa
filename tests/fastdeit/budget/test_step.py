"""The model's GEMMs and bytes are those of the real model's tensors; its times are near those that were measured."""

import dataclasses
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.profiles import PROFILES, newest
from benchmarks.tables import read
from fastdeit.budget.cards import CARDS, find_card
from fastdeit.budget.step import parameters, predict
from fastdeit.budget.work import ATTENTION, GELU, LAYER_NORM, TOKENS, gemms, kept_samples, passes
from fastdeit.model import fused
from fastdeit.model.deit import build_model
from fastdeit.recipes import RECIPES
from refusals import refused

BATCH, LOW = 256, torch.bfloat16
SKIPS = {"drop_path_mode": "skip"}
OPS = {
    "attention": ATTENTION,
    "add_layer_norm": LAYER_NORM,
    "bias_gelu": GELU,
    "assemble_tokens": TOKENS,
}


def config(name, **changes):
    return dataclasses.replace(RECIPES[name]().model, **changes)


class Recorder(TorchDispatchMode):
    """Counts our operators and the bytes of the tensors that they take and return, and the shapes of products."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes, self.products = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        namespace, name = str(func).split(".")[:2]
        tensors = [t for t in (*args, *(out if isinstance(out, tuple) else (out,))) if isinstance(t, torch.Tensor)]
        if namespace == "fastdeit":
            self.calls[name] += 1
            self.bytes[name] += sum(t.numel() * t.element_size() for t in tensors)
        elif name in ("mm", "addmm"):
            a, b = [t for t in args if isinstance(t, torch.Tensor)][-2:]
            self.products[a.shape[0], b.shape[1], a.shape[1]] += 1
        return out


def run_on_meta(cfg, monkeypatch):
    """A forward and backward pass of the fused model without data: FLOPs as PyTorch counts them, and a `Recorder`.

    The meta device has no autocast, so weights and biases get the dtypes that it would cast them to.
    """
    monkeypatch.setattr(fused, "_autocast_dtype", lambda x: LOW)
    with torch.device("meta"):
        model = build_model(dataclasses.replace(cfg, residual_dtype="float32"), 1000)
        fused.fuse(model)
        model.set_drop_path(torch.ones(cfg.depth, 2, BATCH), kept_samples(cfg, BATCH))
        images = torch.empty(BATCH, 3, cfg.img_size, cfg.img_size, dtype=LOW)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.weight.data = module.weight.data.to(LOW)
            if not name.endswith("fc1"):  # its bias goes to our kernel, uncast
                module.bias.data = module.bias.data.to(LOW)
    if cfg.residual_dtype == "bfloat16":
        for token in (model.cls_token, model.dist_token, model.pos_embed):
            if token is not None:
                token.data = token.data.to(LOW)
    with FlopCounterMode(display=False) as flops, Recorder() as recorder:
        output = model(images)
        sum(head.float().sum() for head in output if head is not None).backward()
    return flops.get_total_flops(), recorder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deit_tiny", {}),
        ("deit_small_distilled", {}),
        ("deit_base", {}),
        ("deit_base_distilled", {"img_size": 384}),
        ("deit_tiny", {"depth": 3, "mlp_ratio": 3.0, "patch_size": 32}),
        ("deit_base", SKIPS),
        ("deit_small_distilled", {**SKIPS, "drop_path": 0.5}),
        ("deit3_base", {}),
        ("deit3_large", {"grad_checkpointing": True}),
        ("deit3_base", {**SKIPS, "grad_checkpointing": True}),
    ],
)
def test_the_products_are_those_of_the_real_model(name, changes, monkeypatch):
    cfg = config(name, **changes)
    flops, recorder = run_on_meta(cfg, monkeypatch)
    table = gemms(cfg, BATCH)
    assert sum(gemm.count * gemm.flops for gemm in table) == flops
    expected = Counter()
    for gemm in table:
        # Both heads are one batched product, which has another shape.
        if not (cfg.distilled and gemm.name == "head"):
            expected[tuple(sorted((gemm.m, gemm.n, gemm.k)))] += gemm.count
    found = Counter()
    for shape, count in recorder.products.items():
        found[tuple(sorted(shape))] += count
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"residual_dtype": "bfloat16"}, SKIPS, {**SKIPS, "drop_path": 0.5}, {**SKIPS, "grad_checkpointing": True}],
)
@pytest.mark.parametrize("name", ["deit_base", "deit_small_distilled", "deit3_base"])
def test_the_passes_move_the_tensors_of_the_operators(name, changes, monkeypatch):
    cfg = config(name, **changes)
    _, recorder = run_on_meta(cfg, monkeypatch)
    work = passes(cfg, BATCH)
    for op, part in OPS.items():
        chosen = [each for each in work if each.part == part and each.name != "sum of both gradients"]
        for direction, name in (("forward", op), ("backward", f"{op}_backward")):
            moved = [each for each in chosen if direction in each.name]
            assert sum(each.count for each in moved) == recorder.calls[name]
            # The operators also take vectors and positions, of which a large batch has few.
            assert sum(each.count * each.bytes for each in moved) == pytest.approx(recorder.bytes[name], rel=0.01)


@pytest.mark.parametrize("name", ["deit_tiny", "deit_small_distilled", "deit_base_384", "deit3_base", "deit3_huge_224"])
def test_the_parameters_are_those_of_the_real_model(name):
    with torch.device("meta"):
        model = build_model(config(name), 1000)
    assert parameters(config(name)) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("size", ["small", "base"])
def test_the_prediction_is_near_the_measured_step(size):
    records = [record for record in read(PROFILES) if record["environment"]["commit"].startswith("b3a4987")]
    measured = newest(records, model=f"deit_{size}", precision="bf16")
    assert measured is not None
    step = predict(config(f"deit_{size}"), CARDS["H200"], batch=measured["batch"])
    assert 1e3 * step.seconds == pytest.approx(measured["ms_per_step"], rel=0.1)
    assert step.launches == pytest.approx(sum(kernel[1] for kernel in measured["kernels"]), rel=0.1)


@pytest.mark.parametrize("card", CARDS.values(), ids=list(CARDS))
@pytest.mark.parametrize("size", ["tiny", "base"])
def test_no_part_is_faster_than_its_roof(size, card):
    step = predict(config(f"deit_{size}"), card, ema=True)
    assert all(part.seconds > part.ideal for part in step.parts.values())
    assert step.images_per_second < step.images / step.ideal


def test_what_saves_bytes_or_launches_saves_time():
    card, cfg = CARDS["H200"], config("deit_tiny")
    plain = predict(cfg, card)
    assert predict(config("deit_tiny", residual_dtype="bfloat16"), card).seconds < plain.seconds
    assert predict(config("deit_tiny", **SKIPS), card).seconds < plain.seconds
    assert predict(cfg, card, inputs="patches").seconds < plain.seconds
    assert predict(cfg, card, ema=True).seconds > plain.seconds
    launched = predict(cfg, card, graph=False)
    assert launched.seconds == launched.host > plain.seconds


def test_what_cannot_be_predicted_is_named():
    refused("arch 'deit', not 'resnet50'", predict, config("deit_tiny", arch="resnet50"), CARDS["H200"])
    refused("at least 1", predict, config("deit_tiny"), CARDS["H200"], batch=0)
    refused("no card 'V100' in the table: choose one of H200, H100", find_card, "V100")
    refused("no card 'NVIDIA GH200 480GB'", find_card, "NVIDIA GH200 480GB")


def test_a_card_is_found_by_pytorchs_name():
    assert find_card("NVIDIA H100 80GB HBM3") is CARDS["H100"]
    assert find_card("NVIDIA GeForce RTX 4090") is find_card("rtx4090") is CARDS["RTX 4090"]
