"""Runs with Triton's kernels against the same runs with PyTorch's operations, through the trainer itself."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
import torch

import fastdeit.model.kernel_choice
from fastdeit.config import Recipe
from fastdeit.distributed import World, world
from fastdeit.model.kernel_checks import failure
from fastdeit.model.kernel_choice import OPS, choose_kernels
from fastdeit.model.kernel_table import Row, Table, decide, key
from fastdeit.model.timm_vit import as_deit
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.precision import Precision
from fastdeit.recipes import convnet_teacher
from fastdeit.sections import ModelConfig
from fastdeit.setup import build_student
from fastdeit.teacher.labelling import label_run
from refusals import refused
from runs import changed, evaluated, final_state, newest, same_values, train, trained

FASHION = Path("/usr/share/datasets/fashion-mnist")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "distilled": True}


def chosen(cfg, device=DEVICE, dtype=None):
    device = torch.device(device)
    return choose_kernels(cfg, Precision("test", dtype, device), 10, World(0, 1, 1, device))


def losses(events, recipe):
    return [[e["loss"], e["loss_base"], e["loss_distill"]] for e in events(recipe.run.output, "train")]


@pytest.fixture
def short(data, tiny, tmp_path):
    """Function: a distilled recipe with four samples a step on `train`; a random teacher, or stored labels."""
    teacher = timm.create_model("resnet10t", num_classes=10, in_chans=3)
    for parameter in teacher.fc.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")

    def make(train, name, kernels, kind="hard", **model):
        return tiny(
            model={"embed_dim": 32, "patch_size": 16, "kernels": kernels, "num_classes": 10, **model},
            data={"train": train, "val": None, "repeats": 1},
            objective={"distillation": kind},
            teacher={"name": "resnet10t", "checkpoint": tmp_path / "teacher.pt", "img_size": 32},
            run={"epochs": 1, "global_batch": 4, "device": DEVICE, "precision": "fp32", "output": tmp_path / name},
            departures={"mix_group": 4},
        )

    return make


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
@pytest.mark.parametrize("stored", [False, True])
def test_steps_on_fashion_mnist_equal_pytorchs(short, events, tmp_path, stored):
    """With a teacher in the loop the student takes images; with labels stored beforehand, patches."""
    fashion = tmp_path / "fashion.beton"
    convert(str(FASHION / "train-images-idx3-ubyte.gz"), fashion, limit=12, progress=False)
    recipes = [short(fashion, kernels, kernels, drop_path=0.3) for kernels in ("torch", "triton")]
    if stored:
        recipes = [changed(r, teacher={"labels": tmp_path / "labels"}) for r in recipes]
        with world(DEVICE) as joined:
            label_run(recipes[0], joined, first_epoch=0, end_epoch=1, topk=4)
    for recipe in recipes:
        train(recipe)
    plain, fused = (torch.tensor(losses(events, recipe)) for recipe in recipes)
    assert plain.shape == (3, 3)
    assert len(plain.unique()) == 9
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=0)
    weights = [final_state(r)["model"] for r in recipes]
    assert list(weights[0]) == list(weights[1])
    start = events(recipes[1].run.output, "start")[0]["kernels"]
    how = "as requested" + ("" if DEVICE == "cuda" else ", under Triton's interpreter, which is slow")
    assert start == {"ops": list(OPS), "left": {}, "reason": how, "attention": None, "table": None, "note": ""}
    assert events(recipes[0].run.output, "start")[0]["kernels"]["ops"] == []


@pytest.mark.slow
def test_micro_batches_and_clipping_move_the_weights_as_pytorchs_do(images, short, tmp_path):
    """SGD, whose update shows every error of a gradient; AdamW's hides a factor."""
    convert(str(images / "train"), tmp_path / "few.beton", limit=8, progress=False)
    weights = []
    for kernels in ("torch", "triton"):
        recipe = short(tmp_path / "few.beton", kernels, kernels, depth=1)
        sgd = {"name": "sgd", "lr": 0.5, "warmup_epochs": 0, "clip_grad": 0.5}
        weights.append(trained(changed(recipe, optim=sgd, run={"micro_batch": 3}))["model"])
    for name, right in weights[0].items():
        torch.testing.assert_close(weights[1][name], right, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_a_vision_transformer_of_timm_runs_the_kernels(images, short, tmp_path, capsys, monkeypatch, arch):
    """Two layers of it, since the interpreter is slow."""
    create = timm.create_model
    few = {"depth": 2, "embed_dim": 64, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda name, **o: create(name, **o, **(few if name == arch else {})))
    convert(str(images / "train"), tmp_path / "few.beton", limit=8, progress=False)
    states = []
    for kernels in ("torch", "triton"):
        recipe = short(tmp_path / "few.beton", kernels, kernels)
        plain = replace(recipe.objective, distillation="none")
        recipe = replace(
            recipe, model=ModelConfig(arch=arch, img_size=32, kernels=kernels, drop_path=0.0), objective=plain
        )
        states.append(trained(recipe)["model"])
    out = capsys.readouterr().out
    assert "kernels triton, as requested, under Triton's interpreter, which is slow: token assembly, attention" in out
    for name, right in states[0].items():
        torch.testing.assert_close(states[1][name], right, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_what_a_vision_transformer_of_timm_leaves_to_pytorch_is_said(tmp_path):
    """SwiGLU instead of an MLP with GELU, and attention with normalised queries."""
    recipe = Recipe(name="x", model=ModelConfig(arch="vit_little_patch16_reg1_gap_256", img_size=256, kernels="triton"))
    kernels = chosen(recipe.model)
    assert "layer_norm" in kernels.ops
    _, messages = build_student(recipe, 10, kernels, World(0, 1, 1, torch.device("cpu")))
    assert len(messages) == 1
    assert messages[0].startswith("these modules of vit_little_patch16_reg1_gap_256 stay with PyTorch: ")
    assert chosen(replace(recipe.model, arch="resnet18")).ops == {"distillation_loss", "evaluate_heads"}


@pytest.mark.parametrize(
    ("arch", "shape"),
    [
        ("deit_small_patch16_224", {}),
        ("deit3_base_patch16_224", {"embed_dim": 768, "num_heads": 12, "layer_scale": 1e-5, "no_embed_class": True}),
        (
            "vit_large_patch14_dinov2",
            {"img_size": 518, "patch_size": 14, "embed_dim": 1024, "depth": 24, "num_heads": 16},
        ),
        ("resnet18", None),
        ("swin_tiny_patch4_window7_224", None),
        ("beit_base_patch16_224", None),
    ],
)
def test_the_shape_of_a_vision_transformer_of_timm(arch, shape):
    cfg = ModelConfig(arch=arch, img_size=518 if "dinov2" in arch else 224)
    found = as_deit(cfg)
    if shape is None:
        assert found is None
    else:
        assert found == replace(cfg, **{"arch": "deit", "layer_scale": 1e-5 if "dinov2" in arch else 0.0, **shape})


@pytest.mark.slow
def test_resuming_with_other_kernels_is_a_change(data, short, events):
    """Sums are in another order, so that the run would be another than either."""
    recipe = short(data / "train.beton", "run", "torch", depth=1)
    train(recipe)
    other = changed(recipe, model={"kernels": "triton"})
    refused(r"another model\.kernels \(torch, this run has triton\)", train, other)
    train(changed(other, run={"resume_changed": True}))
    assert events(recipe.run.output, "resume")[0]["changed"] == ["another model.kernels (torch, this run has triton)"]


def table(version, cfg, **windows):
    """A table with a row for each operation on the card "Card", in float32."""
    precision, rows = Precision("fp32", None, torch.device(DEVICE)), []
    for op in OPS:
        times = windows.get(op, {"ours": [2.0], "torch": [1.0]})
        where = dict(zip(("card", "op", "shape", "dtype"), key("Card", op, cfg, precision, 10), strict=True))
        origin = {"batch": 1, "date": "", "commit": None, "torch": "", "triton": ""}
        rows.append(Row(**where, choice=decide(times), windows=times, **origin))
    return Table(version - 1, {}).updated(rows)


@pytest.mark.slow
def test_a_resumed_run_keeps_the_choice_of_another_table(images, short, events, monkeypatch, capsys, tmp_path):
    """The result is the same to the bit; a fresh run takes the new table's choice."""
    convert(str(images / "train"), tmp_path / "few.beton", limit=8, progress=False)
    straight, recipe, fresh = (
        changed(short(tmp_path / "few.beton", name, "auto", depth=1), run={"epochs": 2})
        for name in ("straight", "run", "fresh")
    )
    flash = {"ours": [2.0], "flash": [1.0]}
    old = table(5, recipe.model, attention=flash, distillation_loss={"ours": [1.0], "torch": [2.0]})
    new = table(6, recipe.model, attention=flash)
    monkeypatch.setattr(fastdeit.model.kernel_choice, "_on_gpu", lambda device: True)
    monkeypatch.setattr(fastdeit.model.kernel_choice, "_card", lambda device: "Card")
    monkeypatch.setattr(fastdeit.model.kernel_table, "read", lambda: old)
    expected = trained(straight)
    train(recipe)
    newest(recipe).unlink()  # the first epoch's checkpoint is left
    stored = final_state(recipe)["kernels"]
    assert (stored["table"], stored["attention"], stored["ops"]) == (5, "flash", ["distillation_loss"])
    assert stored["left"]["attention"] == "PyTorch's flash takes 1.000 ms, ours 2.000"
    path = newest(recipe)
    monkeypatch.setattr(fastdeit.model.kernel_table, "read", lambda: new)
    refused(
        r"without assemble_tokens, attention \(flash\), .*, this run has torch\)",
        train,
        changed(recipe, model={"kernels": "torch"}),
    )
    found = trained(recipe)
    out = capsys.readouterr().out
    assert f"kernels triton, as in the checkpoint {path}: the loss; not token assembly: PyTorch takes 1.000 ms" in out
    assert found["kernels"]["table"] == 5
    assert same_values(found["model"], expected["model"])
    assert trained(fresh)["kernels"]["table"] == 6
    assert events(fresh.run.output, "start")[0]["kernels"]["ops"] == []


@pytest.mark.slow
def test_scores_are_those_without_kernels(images, short, tmp_path):
    few = tmp_path / "few.beton"
    convert(str(images / "val"), few, limit=11, shuffle_seed=0, progress=False)
    recipe = short(few, "run", "torch")
    train(recipe)
    options = {"checkpoint": newest(recipe), "val": few, "batch": 6, "device": DEVICE, "precision": "fp32"}
    found = [
        evaluated(**options, loader="torch", kernels=kernels, json=True)["model"] for kernels in ("torch", "triton")
    ]
    assert found[0].keys() == found[1].keys() > {"images", "class", "distillation", "fused_probabilities"}
    for head, scores in found[0].items():
        assert found[1][head] == pytest.approx(scores, rel=1e-5), head


def test_auto_is_pytorch_without_a_gpu(monkeypatch):
    cfg = ModelConfig(**SMALL)
    kernels = chosen(cfg, "cpu")
    assert (kernels.name, kernels.sentence()) == ("torch", "kernels torch: there is no GPU")
    assert chosen(replace(cfg, kernels="torch")).sentence() == "kernels torch: as requested"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    refused(r"there is no GPU\. Set --model\.kernels torch, or auto", chosen, replace(cfg, kernels="triton"), "cpu")
    monkeypatch.setattr(fastdeit.model.kernel_choice.importlib.util, "find_spec", lambda name: None)
    refused("pip install triton", chosen, replace(cfg, kernels="triton"))


def test_what_has_no_place_in_a_model_is_said():
    wide = chosen(ModelConfig(**{**SMALL, "embed_dim": 320, "kernels": "triton"}))
    assert wide.name == "triton without attention"
    assert wide.sentence().endswith("; not attention: its head dim 160 is above 128")
    teacher = chosen(replace(convnet_teacher().model, kernels="triton"))
    assert teacher.ops == {"distillation_loss", "evaluate_heads"}
    assert "timm's own" in teacher.sentence()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize(("distilled", "mode"), [(False, "mask"), (True, "mask"), (False, "skip")])
def test_every_kernel_passes_its_check(dtype, distilled, mode):
    cfg = ModelConfig(**{**SMALL, "distilled": distilled, "drop_path_mode": mode})
    precision = Precision("test", dtype, torch.device(DEVICE))
    assert {op: failure(op, cfg, precision, 10) for op in OPS} == dict.fromkeys(OPS)


@pytest.mark.slow
def test_auto_leaves_a_kernel_that_is_wrong_or_fails(monkeypatch):
    """The decision of a GPU, with the checks under the interpreter where there is none."""
    cfg, here = ModelConfig(**SMALL), torch.device(DEVICE)
    attention = fastdeit.model.kernel_checks.attention

    broken = Mock(side_effect=RuntimeError("out of resource: shared memory\nmore lines"))
    monkeypatch.setattr(
        fastdeit.model.kernel_checks, "attention", lambda *arguments, **options: attention(*arguments, **options) * 1.01
    )
    monkeypatch.setattr(fastdeit.model.kernel_checks, "bias_gelu", broken)
    monkeypatch.setattr(fastdeit.model.kernel_choice, "_on_gpu", lambda device: True)
    monkeypatch.setattr(fastdeit.model.kernel_choice, "_card", lambda device: "a card without rows")
    kernels = choose_kernels(cfg, Precision("test", None, here), 10, World(0, 1, 1, here))
    assert kernels.ops == OPS.keys() - {"attention", "bias_gelu"}
    assert "its error on a small batch is" in kernels.left["attention"]
    assert kernels.left["bias_gelu"] == "it fails here: RuntimeError: out of resource: shared memory"
    assert kernels.name == "triton without attention, bias_gelu"


class _AddToken(torch.autograd.Function):
    """The class token added to its position: right, but its gradient is a view of the positions'."""

    @staticmethod
    def forward(ctx, cls_token, pos_embed):
        return torch.cat([pos_embed[:, :1] + cls_token, pos_embed[:, 1:]], 1)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        return grad[:, :1], grad


def test_gradients_that_share_memory_fail_the_check(monkeypatch):
    """A single backward pass would not show them."""

    def shared(patches, cls_token, dist_token, pos_embed, bias, dtype):
        zeros = torch.zeros_like(cls_token)
        tokens = torch.cat([t.expand(len(patches), -1, -1) for t in (zeros, dist_token)], 1)
        return torch.cat([tokens, patches + bias], 1) + _AddToken.apply(cls_token, pos_embed)

    cfg, precision = ModelConfig(**SMALL), Precision("test", None, torch.device(DEVICE))
    monkeypatch.setattr(fastdeit.model.kernel_checks, "assemble_tokens", shared)
    assert "its error on a small batch is" in failure("assemble_tokens", cfg, precision, 10)
    add = _AddToken.apply
    monkeypatch.setattr(_AddToken, "apply", lambda *tokens: add(*(token * 1 for token in tokens)))
    assert failure("assemble_tokens", cfg, precision, 10) is None


def test_a_nan_fails_its_check(monkeypatch):
    monkeypatch.setattr(fastdeit.model.kernel_checks, "bias_gelu", lambda x, bias: x * bias * float("nan"))
    precision = Precision("test", None, torch.device(DEVICE))
    assert "nan" in failure("bias_gelu", ModelConfig(**SMALL), precision, 10)
