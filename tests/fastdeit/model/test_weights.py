"""Weights in and out, in the layouts of the released code and of timm, with timm as the judge of what is adapted."""

import argparse
import pickle

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from fastdeit.model.deit import build_model
from fastdeit.model.networks import build_network
from fastdeit.model.weights import load_weights, read_checkpoint
from fastdeit.sections import ModelConfig
from refusals import refused

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def student(distilled=False, classes=7, **fields):
    return build_model(ModelConfig(**{**TINY, "distilled": distilled, **fields}), classes).eval()


def released(distilled=False, classes=7, **fields):
    """timm's model, with a state that no initialisation has."""
    name = f"deit_tiny_{'distilled_' * distilled}patch16_224"
    model = timm.create_model(name, num_classes=classes, **{**TINY, **fields}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def assert_same_scores(ours, judge):
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        cls, dist = ours(images)
        torch.testing.assert_close(cls if dist is None else (cls + dist) / 2, judge(images))


def adapt(judge, old):
    """Load weights as timm does, at another resolution too."""
    judge.load_state_dict(checkpoint_filter_fn(old.state_dict(), judge, interpolation="bicubic", antialias=True))


LAYOUTS = {
    "plain": lambda s: s,
    "released": lambda s: {"model": s},
    "released training": lambda s: {"model": s, "model_ema": {}, "epoch": 3, "args": argparse.Namespace(lr=1e-3)},
    "timm": lambda s: {"state_dict": s, "arch": "deit_tiny_patch16_224", "epoch": 3},
    "ddp": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    "compiled ddp": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "fastdeit": lambda s: {"format": 1, "model": s, "ema": None, "recipe": {"name": "x"}},
}


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("layout", [*LAYOUTS, "safetensors"])
def test_every_layout_gives_timms_output(tmp_path, layout, distilled):
    judge, ours = released(distilled), student(distilled)
    path = tmp_path / ("weights.safetensors" if layout == "safetensors" else "weights.pth")
    if layout == "safetensors":
        save_file(judge.state_dict(), path)
    else:
        torch.save(LAYOUTS[layout](judge.state_dict()), path)
    assert load_weights(ours, path) == []
    assert_same_scores(ours, judge)


@pytest.mark.parametrize("keys", [("model", "ema"), ("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_the_average_is_chosen_by_name(keys):
    plain, average = released(), released()
    stored = dict(zip(keys, (plain.state_dict(), average.state_dict()), strict=True))
    for ema, judge in ((False, plain), (True, average)):
        ours = student()
        load_weights(ours, stored, ema=ema)
        assert_same_scores(ours, judge)
    refused("no average", load_weights, student(), {keys[0]: plain.state_dict()}, ema=True)
    refused("only averaged weights", load_weights, student(), {keys[1]: plain.state_dict()})


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(
    "change", [{"img_size": 48}, {"img_size": 24}, {"patch_size": 4}, {"patch_size": 16, "img_size": 64}]
)
def test_resolution_and_patch_are_adapted_as_timm_does(distilled, change):
    old, ours, judge = released(distilled), student(distilled, **change), released(distilled, **change)
    messages = load_weights(ours, {"model": old.state_dict()})
    adapt(judge, old)
    for name, value in judge.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
    same_grid = change.get("img_size", 32) // change.get("patch_size", 8) == 4
    assert any("position embedding" in m for m in messages) != same_grid
    assert any("patch projection" in m for m in messages) == ("patch_size" in change)
    assert not any("reset" in m for m in messages)


DEIT_3 = {"layer_scale": 1e-4, "no_embed_class": True}


def released_deit_3(**fields):
    model = timm.create_model("deit3_small_patch16_224", num_classes=7, **{**TINY, **fields}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_the_authors_names_of_layer_scale():
    """`gamma_1` in their models_v2.py is `ls1.gamma` in timm, whose own conversion is the judge."""
    judge = released_deit_3()
    theirs = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
              for name, value in judge.state_dict().items()}  # fmt: skip
    again = released_deit_3()
    again.load_state_dict(checkpoint_filter_fn(theirs, again, adapt_layer_scale=True))
    ours = student(**DEIT_3)
    assert load_weights(ours, {"model": theirs}) == []
    assert_same_scores(ours, judge)
    assert_same_scores(ours, again)


def test_deit_3_is_resized_as_timm_does():
    old, judge = released_deit_3(), released_deit_3(img_size=48)
    adapt(judge, old)
    ours = student(img_size=48, **DEIT_3)
    assert load_weights(ours, old.state_dict()) == ["position embedding resized from 4 x 4 to 6 x 6 patches"]
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(ours(images).cls, judge(images))


def test_a_head_for_other_classes_gives_a_message():
    old, ours = student(), student()
    names = [f"class {i}" for i in range(len(old.state_dict()["head.bias"]))]
    stored = {"model": old.state_dict(), "class_names": names}
    others = [*names[:2], "other", *names[3:]]
    assert load_weights(ours, stored, class_names=names) == load_weights(ours, stored) == []
    (sentence,) = load_weights(ours, stored, class_names=others)
    assert "its classes or their order differ: class 2 is 'class 2' in the checkpoint, 'other' here" in sentence
    assert torch.equal(ours.state_dict()["head.weight"], old.state_dict()["head.weight"])
    more = student(classes=len(names) + 1)
    (sentence,) = load_weights(more, stored, class_names=[*names, "new"])
    assert "head reset" in sentence


@pytest.mark.parametrize("img_size", [32, 48])
def test_a_token_is_added_to_deit_3_and_taken_out_again(img_size):
    old = released_deit_3()
    ours = student(True, img_size=img_size, **DEIT_3)
    fresh = {name: value.clone() for name, value in ours.state_dict().items()}
    messages = load_weights(ours, old.state_dict())
    assert messages[-1] == "distillation token and head_dist reset: the checkpoint has none"
    for name in ("dist_token", "head_dist.weight", "head_dist.bias"):
        assert torch.equal(ours.state_dict()[name], fresh[name])
    without = student(img_size=img_size, **DEIT_3)
    assert load_weights(without, ours.state_dict()) == [
        "distillation token and its head are left out: this model has none"
    ]
    judge = released_deit_3(img_size=img_size)
    adapt(judge, old)
    images = torch.randn(2, 3, img_size, img_size)
    torch.testing.assert_close(without(images).cls, judge(images))


def test_deit_and_deit_3_do_not_mix():
    missing = r"missing: blocks\.0\.ls1\.gamma.* or set --model.layer_scale 0$"
    refused(missing, load_weights, student(**DEIT_3), released().state_dict())
    unexpected = r"unexpected: blocks\.0\.ls1\.gamma.* or set --model.layer_scale 0.0001$"
    refused(unexpected, load_weights, student(), released_deit_3().state_dict())


@pytest.mark.parametrize("distilled", [False, True])
def test_heads_of_other_classes_stay_fresh(distilled):
    old, ours = released(distilled), student(distilled, classes=3)
    fresh = {name: value.clone() for name, value in ours.state_dict().items()}
    messages = load_weights(ours, old.state_dict())
    heads = ["head", "head_dist"] if distilled else ["head"]
    assert messages == [f"{head} reset: the checkpoint has 7 classes, this model 3" for head in heads]
    for name, value in ours.state_dict().items():
        wanted = fresh if name.startswith("head") else old.state_dict()
        assert torch.equal(value, wanted[name]), name


def test_a_token_is_added_without_touching_the_rest():
    old, ours = released(), student(True)
    fresh = {name: value.clone() for name, value in ours.state_dict().items()}
    messages = load_weights(ours, old.state_dict())
    assert len(messages) == 1
    assert "reset" in messages[0]
    for name in ("dist_token", "head_dist.weight", "head_dist.bias"):
        assert torch.equal(ours.state_dict()[name], fresh[name])
    positions = ours.pos_embed.detach()
    assert torch.equal(positions[:, [0, *range(2, 18)]], old.pos_embed)
    assert torch.equal(positions[:, 1], fresh["pos_embed"][:, 1])
    # Without the new token among them, the other weights compute what timm's do.
    images = torch.randn(2, 3, 32, 32)
    tokens = torch.cat([ours.cls_token.expand(2, -1, -1), ours.patch_embed(images)], 1) + old.pos_embed
    with torch.no_grad():
        for block in ours.blocks:
            tokens = block(tokens)
        torch.testing.assert_close(ours.head(ours.norm(tokens)[:, 0]), old(images))


@pytest.mark.parametrize("img_size", [32, 48])
def test_a_token_is_dropped_whole(img_size):
    old, ours = released(True), student(img_size=img_size)
    messages = load_weights(ours, {"model": old.state_dict()})
    assert sum("left out" in m for m in messages) == 1
    assert not any("reset" in m for m in messages)
    judge = released(True, img_size=img_size)
    adapt(judge, old)
    assert torch.equal(ours.pos_embed[:, 0], judge.pos_embed[:, 0])
    torch.testing.assert_close(ours.pos_embed[:, 1:], judge.pos_embed[:, 2:])


def test_a_token_is_added_at_another_resolution():
    old, ours, judge = released(), student(True, img_size=48), released(img_size=48)
    messages = load_weights(ours, old.state_dict())
    assert len(messages) == 2
    adapt(judge, old)
    torch.testing.assert_close(ours.pos_embed[:, 2:], judge.pos_embed[:, 1:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("blocks.1.attn.qkv.weight"), "missing: blocks.1.attn.qkv.weight"),
        (lambda s: s.update({"blocks.0.ls1.gamma": torch.ones(48)}), "unexpected: blocks.0.ls1.gamma"),
        (lambda s: s.update({"norm.bias": torch.ones(3)}), r"of another shape: norm.bias \(3,\) instead of \(48,\)"),
        (lambda s: s.update({"pos_embed": torch.ones(1, 12, 48)}), "pos_embed has 12 rows"),
        (lambda s: s.update({"pos_embed": torch.ones(1, 17, 8)}), r"pos_embed \(1, 17, 8\)"),
        (lambda s: s.update({"head.weight": torch.ones(())}), r"head.weight \(\)"),
        (lambda s: s.update({"cls_token": [1, 2]}), "no tensor under cls_token"),
    ],
)
def test_all_else_is_strict_and_leaves_the_model_alone(damage, message):
    state = released().state_dict()
    damage(state)
    ours = student()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    refused(message, load_weights, ours, {"model": state})
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_another_width_names_the_first_keys_and_counts_the_rest():
    refused(r"of another shape: .* and \d+ more", load_weights, student(embed_dim=96), released().state_dict())


class Bomb:
    def __reduce__(self):
        return print, ("a checkpoint ran code",)


def test_untrusted_files_run_nothing(tmp_path, capsys):
    torch.save({"model": Bomb()}, tmp_path / "bomb.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "noise.pth").write_bytes(np.random.default_rng(0).bytes(4096))
    (tmp_path / "noise.safetensors").write_bytes(np.random.default_rng(0).bytes(4096))
    torch.save(released().state_dict(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("bomb.pth", "raw.pth", "noise.pth", "noise.safetensors", "cut.pth", "empty.pth", "absent.pth"):
        refused(name, load_weights, student(), tmp_path / name)
    refused("no such checkpoint", read_checkpoint, tmp_path / "absent.pth")
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize("stored", [{}, {"model": [1]}, {"model": {}}, {"model": torch.ones(2)}])
def test_what_is_no_state_dict_is_refused(stored):
    refused("checkpoint", load_weights, student(), stored)


def test_a_file_that_is_no_dict_is_refused(tmp_path):
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    refused(r"tensor\.pth holds a Tensor", read_checkpoint, tmp_path / "tensor.pth")


def test_a_convnet_is_fine_tuned_with_other_classes(tmp_path):
    old = timm.create_model("resnet10t", num_classes=5)
    torch.save({"state_dict": old.state_dict()}, tmp_path / "convnet.pth")
    ours = build_network(ModelConfig(arch="resnet10t", drop_path=0.0), 4)
    assert load_weights(ours, tmp_path / "convnet.pth") == ["fc reset: the checkpoint has 5 classes, this model 4"]
    for name, value in old.state_dict().items():
        assert name.startswith("fc.") or torch.equal(ours.state_dict()[name], value)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["cait_xxs24_224", "beit_base_patch16_224"])
def test_timms_own_gammas_keep_their_names(arch):
    """CaiT and BEiT have parameters of the names that the authors of DeiT III gave to LayerScale's."""
    torch.manual_seed(0)
    model = build_network(ModelConfig(arch=arch, drop_path=0.0), 5)
    other = timm.create_model(arch, num_classes=5)
    assert "blocks.0.gamma_1" in other.state_dict()
    assert load_weights(model, {"model": other.state_dict()}) == []
    assert torch.equal(model.state_dict()["blocks.0.gamma_1"], other.state_dict()["blocks.0.gamma_1"])
