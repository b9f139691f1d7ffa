"""A model with kernels against the same model without, which is timm's."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn
from torch.nn.utils import prune
from torch.testing import assert_close as near

from fastdeit.model.deit import build_model
from fastdeit.model.fused import fuse
from fastdeit.sections import ModelConfig
from operators import Scale

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def pair(name="deit_tiny_patch16_224", device="cpu", **options):
    """timm's model, with weights that no symmetry hides, and a fused copy."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **options}).to(device)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    fused = copy.deepcopy(model)
    return model, fused, fuse(fused)


def own_pair(device, classes=5, **fields):
    """Our own model, and a fused copy."""
    torch.manual_seed(0)
    cfg = ModelConfig(**{"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, **fields})
    model = build_model(cfg, classes).to(device)
    fused = copy.deepcopy(model)
    fuse(fused)
    return model, fused


def step(model, images):
    torch.manual_seed(1)
    out = model(images)
    loss = out.square().mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "deit3_small_patch16_224",
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        "vit_tiny_patch16_224.augreg_in21k",
    ],
)
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_equals_timm(device, name, drop_path):
    model, fused, swap = pair(name, device, drop_path_rate=drop_path)
    assert not swap.left
    assert "blocks.1.attn" in swap.replaced
    assert {"blocks", "tokens"} < set(swap.replaced)
    images = torch.randn(4, 3, 16, 16, device=device)
    loss, grads = step(model, images)
    mine, my_grads = step(fused, images)
    near(mine, loss, rtol=1e-5, atol=1e-6)
    for parameter, grad in grads.items():
        near(my_grads[parameter], grad, rtol=1e-4, atol=2e-6, msg=lambda m, p=parameter: f"{p}: {m}")
    model.eval(), fused.eval()
    near(fused(images), model(images), rtol=1e-5, atol=1e-5)
    features = [m.forward_intermediates(images, indices=2)[1][0] for m in (model, fused)]
    near(*features, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_training_steps_equal_timms(device):
    model, fused, _ = pair(device=device, drop_path_rate=0.2)
    losses = []
    for m in (model, fused):
        torch.manual_seed(2)
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3)
        own = []
        for _ in range(3):
            loss = nn.functional.cross_entropy(m(torch.randn(4, 3, 16, 16).to(device)), torch.arange(4, device=device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            own.append(loss.detach())
        losses.append(torch.stack(own))
    near(*losses, rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_accumulated_and_clipped_gradients_equal_timms(device, name):
    model, fused, _ = pair(name, device)
    parts = torch.randn(6, 3, 16, 16, device=device).split(2)
    for m in (model, fused):
        for part in parts:
            m(part).square().sum().backward()
    for clip in (None, 0.5):
        if clip is not None:
            for m in (model, fused):
                nn.utils.clip_grad_norm_(m.parameters(), clip)
        for (parameter, right), mine in zip(model.named_parameters(), fused.parameters(), strict=True):
            near(mine.grad, right.grad, rtol=1e-3, atol=1e-4, msg=lambda m, p=parameter: f"{p}: {m}")
    gradients = [parameter.grad for parameter in fused.parameters()]
    for place, gradient in enumerate(gradients):
        gradient.fill_(place)
    assert all((gradient == place).all() for place, gradient in enumerate(gradients))


def test_state_dict_is_timms(device):
    model, fused, _ = pair(device=device)
    assert list(fused.state_dict()) == list(model.state_dict())
    fused.load_state_dict(model.state_dict(), strict=True)
    assert fuse(fused).replaced == []


def test_our_own_model_with_planned_stochastic_depth(device):
    model, fused = own_pair(device, distilled=True)
    images = torch.randn(3, 3, 16, 16, device=device)
    masks = torch.tensor([0.0, 1.0, 2.0], device=device).expand(2, 2, 3)
    for m in (model, fused):
        m.set_drop_path(masks)
    for mine, theirs in zip(fused(images), model(images), strict=True):
        near(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("mode", ["mask", "skip"])
def test_deit_3_with_and_without_kernels(device, distilled, mode):
    """Also with a distillation token, which timm's deit3 does not have, and with half the samples dropped."""
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    cfg = ModelConfig(**shape, distilled=distilled, layer_scale=0.1, no_embed_class=True, drop_path_mode=mode)
    model = build_model(cfg, 5).to(device)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    fused = copy.deepcopy(model)
    assert not fuse(fused).left
    images, masks = torch.randn(4, 3, 16, 16, device=device), torch.tensor([0.0, 2.0, 2.0, 0.0], device=device)
    gradients = []
    for m in (model, fused):
        m.set_drop_path(masks.expand(3, 2, 4), [2, 2, 2])
        out = m(images)
        loss = out.cls.square().sum() + (0 if out.dist is None else out.dist.sum())
        gradients.append(torch.autograd.grad(loss, list(m.parameters())))
    for (name, _), theirs, mine in zip(model.named_parameters(), *gradients, strict=True):
        near(mine, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("drop_rate", [0.0, 0.2])
def test_gradient_checkpointing_gives_the_same_bits(device, kernels, drop_rate):
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    images, masks = torch.randn(4, 3, 16, 16, device=device), torch.tensor([0.0, 2.0, 2.0, 0.0], device=device)
    gradients, saved = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        cfg = ModelConfig(**shape, distilled=True, layer_scale=0.1, drop_rate=drop_rate)
        model = build_model(replace(cfg, grad_checkpointing=checkpointing), 5).to(device)
        if kernels:
            fuse(model)
        model.set_drop_path(masks.expand(3, 2, 4))
        model.set_dropout(None)  # PyTorch's generator draws: both passes over a block must see the same numbers
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            out = model(images)
        saved.append(sum(sizes))
        loss = out.cls.square().sum() + out.dist.sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for (name, _), plain, checkpointed in zip(model.named_parameters(), *gradients, strict=True):
        assert torch.equal(plain, checkpointed), name
    assert saved[1] < saved[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_biases_get_their_gradients_with_dropout_adapters_and_frozen_weights(device, frozen):
    """The kernels compute the gradients of biases that other layers have added."""
    model, fused = own_pair(device, depth=4)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        for m in (model, fused):
            m.get_parameter(name).requires_grad_(not frozen or name.endswith("bias"))
    fused.load_state_dict(model.state_dict())
    for m in (model, fused):
        m.blocks[0].mlp.fc2.register_forward_hook(lambda module, arguments, out: 2 * out)
        m.blocks[1].attn.proj = nn.Sequential(m.blocks[1].attn.proj, nn.Linear(32, 32, device=device))
        m.blocks[2].attn.proj_drop = m.blocks[2].mlp.drop2 = Scale(0.5)  # as a dropout, but the same each time
    fused.blocks[1].attn.proj[1].load_state_dict(model.blocks[1].attn.proj[1].state_dict())
    images = torch.randn(3, 3, 16, 16, device=device)
    for m in (model, fused):
        torch.manual_seed(1)
        m(images).cls.square().sum().backward()
    for (name, mine), theirs in zip(fused.named_parameters(), model.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            near(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["attn", "mlp", "attn.qkv", "attn.proj", "attn.proj_drop", "mlp.fc2", "mlp.drop2"])
@pytest.mark.parametrize("number", [0, 1])
def test_hooks_and_replaced_methods_go_on(device, place, number):
    model, fused = own_pair(device)
    seen, images = {"plain": [], "fused": []}, torch.randn(2, 3, 16, 16, device=device)
    outputs = []
    for name, m in (("plain", model), ("fused", fused)):
        module = m.blocks[number].get_submodule(place)
        forward = module.forward
        module.forward = lambda *given, forward=forward, **named: 2 * forward(*given, **named)
        outputs.append(m(images).cls)
        del module.forward
        module.register_full_backward_hook(lambda module, into, out, name=name: seen[name].append("backward"))
        module.register_forward_hook(lambda module, arguments, out, name=name: seen[name].append("forward"))
        m(images).cls.sum().backward()
    near(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    assert seen["fused"] == seen["plain"] == ["forward", "backward"]


@pytest.mark.gpu  # Triton's interpreter multiplies bfloat16 wrongly
@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
def test_in_bfloat16_as_exact_as_pytorch(device, residual):
    shape = {"img_size": 64, "embed_dim": 192, "depth": 4, "num_heads": 3}
    model, fused = own_pair(device, 10, **shape, residual_dtype=residual)
    images = torch.randn(8, 3, 64, 64, device=device)
    exact = copy.deepcopy(model).double()(images.double()).cls
    errors = []
    for m in (model, fused):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            errors.append((m(images).cls.double() - exact).square().mean().sqrt())
    assert errors[1] <= 2 * errors[0]


@pytest.mark.slow
def test_under_torch_compile_without_a_graph_break(device):
    _, fused, _ = pair(device=device)
    images = torch.randn(2, 3, 16, 16, device=device)
    whole = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for compiled, eager in zip(step(whole, images)[1].values(), step(fused, images)[1].values(), strict=True):
        near(compiled, eager)


@pytest.mark.slow
def test_gradient_checkpointing_under_torch_compile(device):
    _, model = own_pair(device, layer_scale=0.1, grad_checkpointing=True)
    model.set_drop_path(torch.tensor([0.0, 2.0], device=device).expand(2, 2, 2))
    images = torch.randn(2, 3, 16, 16, device=device)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager, compiled = (torch.autograd.grad(m(images).cls.sum(), list(model.parameters())) for m in (model, whole))
    for mine, theirs in zip(compiled, eager, strict=True):
        near(mine, theirs)


def test_what_is_left_is_named(device):
    model = timm.create_model("deit_tiny_patch16_224", **SMALL, qk_norm=True, act_layer=nn.ReLU)
    model.blocks[1].ls1 = Scale(0.5)
    swap = fuse(model)
    assert "blocks.0.attn: has q_norm" in swap.left
    assert "blocks.0.mlp: its activation is ReLU, not the exact GELU" in swap.left
    assert "blocks.1: ls1 is unknown" in swap.left
    assert "blocks.0" in swap.replaced
    assert "blocks" not in swap.replaced


class Adapted(nn.Linear):
    """As LoRA's: it adds to what its weight gives."""

    def forward(self, x):
        return super().forward(x) + 1.0


class Doubling(nn.LayerNorm):
    def forward(self, x):
        return 2.0 * super().forward(x)


class Clipped(nn.GELU):
    def forward(self, x):
        return super().forward(x).clamp(max=0.1)


def test_what_a_subclass_or_a_hook_computes_is_kept(device):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = timm.create_model("deit_tiny_patch16_224", **{**SMALL, "depth": 4}).to(device)
        model.blocks[0].mlp.fc1.__class__ = Adapted
        model.blocks[1].mlp.act = Clipped()
        model.blocks[2].norm2.__class__ = Doubling
        prune.l1_unstructured(model.blocks[3].mlp.fc1, "weight", amount=0.5)
        models.append(model.eval())
    model, fused = models
    swap = fuse(fused)
    assert [line.partition(":")[0] for line in swap.left] == [
        "blocks.0.mlp", "blocks.1.mlp", "blocks.2", "blocks.3.mlp",
    ]  # fmt: skip
    images = torch.randn(2, 3, 16, 16, device=device)
    for m in (model, fused):
        m.blocks[3].mlp.fc1.weight_orig.data += 1.0
    near(fused(images), model(images), rtol=1e-5, atol=1e-5)


def test_a_block_that_is_wrapped_afterwards_is_called(device):
    """As activation checkpointing and FSDP wrap them."""

    class Wrapped(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block, self.calls = block, 0

        def forward(self, x):
            self.calls += 1
            return self.block(x)

    model, fused, _ = pair(device=device)
    fused.blocks[1] = Wrapped(fused.blocks[1])
    images = torch.randn(2, 3, 16, 16, device=device)
    near(fused(images), model(images), rtol=1e-5, atol=1e-5)
    assert fused.blocks[1].calls == 1


@pytest.mark.slow
@pytest.mark.parametrize("halved", [False, True])
def test_in_float16_as_exact_as_timm(device, halved):
    """Under autocast with float32 weights, whose gradients are float32; and in a model that is float16 itself."""
    model, fused, _ = pair("deit_tiny_distilled_patch16_224", device)
    images = torch.randn(4, 3, 16, 16, device=device)
    exact = step(copy.deepcopy(model).double(), images.double())[1]
    if halved:
        model, fused, images = model.half(), fused.half(), images.half()
    found = []
    for m in (model, fused):
        with torch.autocast(device.type, dtype=torch.float16, enabled=not halved):
            out = m(images)
        assert out.dtype is torch.float16
        found.append(torch.autograd.grad(out.float().square().mean(), list(m.parameters())))
    for parameter, mine, theirs in zip(model.parameters(), *reversed(found), strict=True):
        assert mine.dtype is theirs.dtype is parameter.dtype
    errors = [
        max(float((g.double() - e).abs().max() / e.abs().max()) for g, e in zip(grads, exact.values(), strict=True))
        for grads in found
    ]
    assert errors[1] <= max(2 * errors[0], 4e-3)


def test_a_mask_is_refused(device):
    _, fused, _ = pair(device=device)
    with pytest.raises(ValueError, match="no mask"):
        fused.blocks[0](torch.randn(1, 5, 32, device=device), attn_mask=torch.ones(5, 5, device=device))


def test_another_attention_of_the_kind_is_named(device):
    class Shifted(Attention):
        def forward(self, x, attn_mask=None, is_causal=False):
            return super().forward(x.roll(1, 1), attn_mask, is_causal)

    model = timm.create_model("deit_tiny_patch16_224", **SMALL)
    model.blocks[0].attn.__class__ = Shifted
    assert fuse(model).left == ["blocks.0.attn: is a Shifted, which may compute something else"]


def test_an_adapter_that_comes_afterwards_is_called(device):
    model, fused, _ = pair(device=device)
    for one in (model, fused):
        one.blocks[0].mlp.fc1.__class__ = Adapted
    images = torch.randn(2, 3, 16, 16, device=device)
    near(fused(images), model(images), rtol=1e-5, atol=1e-5)


def test_what_is_no_model_or_no_operation_is_refused():
    with pytest.raises(TypeError, match="not a str"):
        fuse("deit_tiny_patch16_224")
    with pytest.raises(ValueError, match="'atention' is not an operation: choose from assemble_tokens, attention"):
        fuse(timm.create_model("deit_tiny_patch16_224", **SMALL), {"atention": "is slower"})


def test_a_convnet_is_refused():
    with pytest.raises(ValueError, match="nothing in ResNet can be fused"):
        fuse(timm.create_model("resnet18"))
