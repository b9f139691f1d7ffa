"""The table of measurements: its contents, its choices, and how a run uses them."""

import json
from dataclasses import replace

import pytest
import torch

from fastdeit.distributed import World
from fastdeit.model import kernel_checks, kernel_choice, kernel_table
from fastdeit.model.kernel_choice import OPS, Kernels, choose_kernels
from fastdeit.model.kernel_table import Row, Table, decide, key, read, write
from fastdeit.model.networks import build_network
from fastdeit.pipelines.errors import UserError
from fastdeit.precision import Precision
from fastdeit.sections import ModelConfig
from refusals import refused
from steps import in_two_processes, kernels_on_two_cards

CPU = torch.device("cpu")
BF16, FP32 = Precision("bf16", torch.bfloat16, CPU), Precision("fp32", None, CPU)
CFG = ModelConfig(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, distilled=True)


def make_row(op="attention", windows=None, precision=BF16, card="Card", cfg=CFG):
    windows = windows or {"ours": [1.0, 1.1], "flash": [0.8, 0.9]}
    card, op, shape, dtype = key(card, op, cfg, precision, 10)
    return Row(
        card=card, op=op, shape=shape, dtype=dtype, choice=decide(windows), windows=windows, batch=256,
        date="2026-11-27T05:00:00+00:00", commit=None, torch="2.11.0", triton="3.6.0",
    )  # fmt: skip


def table_of(*rows, version=3):
    return Table(version - 1, {}).updated(rows)


@pytest.fixture
def choose(monkeypatch):
    """Function: the kernels that a table chooses for a GPU named "Card"; only the checks in `failing` fail."""

    def run(table, precision=BF16, kept=None, failing=(), cfg=CFG):
        monkeypatch.setattr(kernel_choice, "_on_gpu", lambda device: True)
        monkeypatch.setattr(kernel_choice, "_card", lambda device: "Card")
        monkeypatch.setattr(kernel_table, "read", lambda: table)
        monkeypatch.setattr(
            kernel_checks, "failure", lambda op, *_: "it fails here: wrong" if (op, *_[3:]) in failing else None
        )
        return choose_kernels(cfg, precision, 10, World(0, 1, 1, CPU), kept)

    return run


def test_the_tables_rows_are_right_and_of_operations_that_a_run_chooses():
    table = read()
    assert table.version >= 1
    assert {row.op for row in table.rows.values()} <= OPS.keys() == kernel_table._SHAPES.keys()
    assert kernel_table.PATH.parent.name == "model"


def test_a_row_is_of_a_shape_and_a_dtype():
    keys = {op: key("Card", op, CFG, BF16, 10)[2:] for op in OPS}
    assert keys == {
        "assemble_tokens": ("6 tokens, 32 channels", "bfloat16"),
        "attention": ("6 tokens, 2 heads of 16", "bfloat16"),
        "layer_norm": ("6 tokens, 32 channels", "bfloat16"),
        "bias_gelu": ("6 tokens, 128 channels", "bfloat16"),
        "distillation_loss": ("2 x 10 classes", "bfloat16"),
        "evaluate_heads": ("2 x 10 classes", "bfloat16"),
    }
    residual = replace(CFG, residual_dtype="bfloat16")
    found = {op for op in OPS if key("Card", op, residual, BF16, 10)[2:] != keys[op]}
    assert found == {"assemble_tokens", "layer_norm"}
    assert key("Card", "attention", CFG, FP32, 10)[3] == "float32"


@pytest.mark.parametrize(
    ("windows", "choice"),
    [
        ({"ours": [1.0, 1.0, 1.1], "torch": [0.9, 0.95, 0.97]}, "torch"),
        ({"ours": [1.0, 1.0, 1.1], "torch": [0.98, 0.98, 0.98]}, "ours"),  # within the margin
        ({"ours": [0.94, 1.0, 1.1], "torch": [0.9, 0.9, 0.95]}, "ours"),  # windows overlap
        ({"ours": [1.0], "cudnn": [0.9], "flash": [0.8], "efficient": [2.0]}, "flash"),
        ({"ours": [1.0]}, "ours"),
    ],
)
def test_pytorch_must_be_faster_by_more_than_the_margin_and_the_noise(windows, choice):
    assert decide(windows) == choice


def test_a_newer_row_replaces_the_old_one(tmp_path):
    path = tmp_path / "table.json"
    other = make_row("bias_gelu", {"ours": [1.0], "torch": [2.0]})
    table = table_of(make_row(), other)
    write(table, path)
    assert read(path) == table
    newer = replace(make_row(windows={"ours": [1.0], "cudnn": [1.2]}), torch="2.12.0")
    write(table.updated([newer]), path)
    found = read(path)
    assert found.version == 4
    assert list(found.rows.values()) == [newer, other]
    assert len(path.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choice": "cudnn"}, "its choice is cudnn, but its windows decide for flash"),
        (
            {"op": "atention"},
            r"\(\{'card': 'Card', 'op': 'atention', .*\): its op is not one of assemble_tokens, ",
        ),
        ({"windows": {"flash": [1.0]}}, "its windows are not those of ours, cudnn, flash, efficient"),
        ({"windows": {"ours": [1.0], "torch": [1.0]}}, "its windows are not those of ours"),
        ({"windows": {"ours": [1.0, float("nan")]}}, "not lists of milliseconds"),
        ({"windows": {"ours": []}}, "not lists of milliseconds"),
        ({"windows": {"ours": "1.0"}}, "TypeError"),
        ({"card": ["Card"]}, "TypeError: unhashable"),
        ({"ms": 3.0}, "unexpected keyword argument 'ms'"),
        ({"op": "attention"}, "another row has its card, operation, shape and dtype"),
    ],
)
def test_a_row_that_was_edited_is_refused_by_its_number(tmp_path, change, message):
    path = tmp_path / "table.json"
    write(table_of(make_row(), make_row(card="Card 2")), path)
    content = json.loads(path.read_text())
    content["rows"][1] |= {"card": "Card", **change}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert f"{path}: row 2 (" in str(caught.value)
    assert "delete the row and measure it again with `python -m benchmarks tune --choose`" in str(caught.value)


@pytest.mark.parametrize("text", ['{"version": 1, "rows": [', "[]", '{"rows": []}', '{"version": "a", "rows": []}'])
def test_a_damaged_table_is_refused(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    refused("restore the file from the repository", read, path)


def test_auto_takes_what_is_faster_and_names_it(choose):
    rows = [make_row(op, {"ours": [1.0], "torch": [1.2]}) for op in OPS if op not in ("attention", "layer_norm")]
    table = table_of(*rows, make_row(), make_row("layer_norm", {"ours": [0.5], "torch": [0.4]}))
    kernels = choose(table)
    assert kernels.ops == OPS.keys() - {"attention", "layer_norm"}
    assert (kernels.attention, kernels.table) == ("flash", 3)
    assert kernels.name == "triton without attention (flash), layer_norm"
    assert kernels.sentence() == (
        "kernels triton, measured on Card (version 3 of the table), each matched PyTorch on a small batch: token "
        "assembly, bias + GELU, the loss, the scores; not attention: PyTorch's flash takes 0.850 ms, ours 1.050; not "
        "LayerNorm with the residual: PyTorch takes 0.400 ms, ours 0.500"
    )
    assert kernels.event()["ops"] == ["assemble_tokens", "bias_gelu", "distillation_loss", "evaluate_heads"]
    requested = choose(table, cfg=replace(CFG, kernels="triton"))
    assert (requested.ops, requested.attention, requested.table) == (OPS.keys(), None, None)
    assert choose(table, cfg=replace(CFG, kernels="torch")).attention is None


def test_an_unknown_card_shape_or_dtype_takes_ours_and_names_the_command(choose):
    for table in (table_of(make_row(card="Another card")), table_of(make_row(precision=FP32))):
        kernels = choose(table)
        assert kernels.ops == OPS.keys()
        assert kernels.sentence().endswith(
            "Not measured on Card, so ours by default: token assembly, attention, LayerNorm with the residual, bias + "
            "GELU, the loss, the scores. `python -m benchmarks tune --choose --recipe RECIPE --classes 10` in a "
            "checkout measures them; RECIPE is a name or a run's recipe.json"
        )
    assert choose(table_of(make_row(precision=FP32)), FP32).attention == "flash"
    wide = replace(CFG, embed_dim=320)
    assert "attention" not in choose(table_of(), cfg=wide).note


def test_a_backend_whose_check_fails_is_left_and_named(choose):
    kernels = choose(table_of(make_row()), failing={("attention", "flash"), ("bias_gelu",)})
    assert (kernels.name, kernels.attention) == ("triton without attention, bias_gelu", None)
    assert kernels.left["attention"] == (
        "PyTorch chooses its backend, since flash's check failed: it fails here: wrong"
    )


def test_a_checkpoints_choice_wins_over_the_table(choose):
    kept = replace(choose(table_of(make_row())), reason="as in the checkpoint x.pt")
    assert choose(table_of(version=9), kept=kept) == kept
    assert choose(table_of(version=9), kept=kept, failing={("attention", "flash")}).name == "triton without attention"


@pytest.mark.slow
def test_processes_on_different_cards_take_the_main_processs_choice(tmp_path):
    """If a check fails on one process, the operation is left to PyTorch on all."""
    first, second = in_two_processes(kernels_on_two_cards, tmp_path)
    assert first["name"] == second["name"] == "triton without attention (flash), bias_gelu"
    assert first["left"]["bias_gelu"] == "its check failed on another process"
    assert second["left"]["bias_gelu"] == "wrong on card 1"
    assert "measured on card 0, the main process's card (" in second["reason"]


def _attention_operators(model, images):
    """PyTorch's attention operators in the compiled forward pass."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    found = []

    def compiler(graph, _):
        found.extend(str(node.target) for node in graph.graph.nodes if "attention" in str(node.target))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    out = torch.compile(model, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)(images)
    return found, out


@pytest.mark.slow
def test_a_model_runs_the_backend_of_the_choice(monkeypatch):
    """It compiles as one graph and has the same state dict as any other model."""
    monkeypatch.setitem(kernel_table.BACKENDS, "math", torch.nn.attention.SDPBackend.MATH)
    images, models = torch.randn(2, 3, 16, 16), {}
    for name in (None, "flash", "math"):
        torch.manual_seed(0)
        models[name] = build_network(CFG, 10, Kernels(frozenset(), {}, "", attention=name)).eval()
    flash, out = _attention_operators(models["flash"], images)
    assert flash == ["aten._scaled_dot_product_flash_attention_for_cpu.default"]
    assert _attention_operators(models["math"], images)[0] == []
    assert models[None].state_dict().keys() == models["flash"].state_dict().keys()
    torch.testing.assert_close(out.cls, models[None](images).cls)


@pytest.mark.slow
def test_a_fused_model_runs_the_backend_too(choose):
    kernels = choose(table_of(make_row()))
    torch.manual_seed(0)
    fused = build_network(CFG, 10, kernels)
    torch.manual_seed(0)
    plain = build_network(CFG, 10)
    assert type(fused.blocks[0].attn).__module__ == "fastdeit.model.attention_backend"
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(fused(images).cls, plain(images).cls)
