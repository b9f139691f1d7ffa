"""The search for operations that PyTorch runs faster: what is timed, in which order, and which rows result."""

import json

import pytest
import torch

from benchmarks.kernels import choose
from benchmarks.kernels.benchmark import Clock
from benchmarks.kernels.choose import Options, cases, training_call
from fastdeit.config import Recipe
from fastdeit.model import kernel_table
from fastdeit.model.kernel_choice import OPS
from fastdeit.pipelines.errors import UserError
from fastdeit.sections import ModelConfig

CPU = torch.device("cpu")
CFG = ModelConfig(img_size=16, patch_size=8, embed_dim=32, num_heads=2, distilled=True, num_classes=10)


class FakeClock:
    """Each call takes the milliseconds given for its candidate; ours is number 0 of a case, unless it is refused."""

    def __init__(self, milliseconds):
        self.milliseconds, self.calls, self.order = milliseconds, [], []

    def graphed(self, call):
        if call not in self.calls:
            call()
            self.calls.append(call)
        number = self.calls.index(call)
        self.order.append(number)
        return [self.milliseconds(number)]

    def clock(self):
        return Clock(lambda call: [], self.graphed)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Function: options for a tiny recipe. Nothing is compiled, and every kernel passes its check."""
    monkeypatch.setitem(choose.RECIPES, "small", lambda: Recipe(name="small", model=CFG))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(choose, "failure", lambda *_: None)
    paths = {"table": tmp_path / "table.json", "results": tmp_path / "tune.jsonl"}
    return lambda **given: Options(**{"recipe": ("small",), "batch": 3, "windows": 2, **paths, **given})


@pytest.mark.slow
def test_windows_take_turns_and_rows_name_what_is_faster(small, monkeypatch, capsys):
    monkeypatch.setattr(choose, "OPS", {"attention": "attention", "bias_gelu": "bias + GELU"})
    fake = FakeClock(lambda number: {0: 2.0, 1: 1.0, 2: 1.0, 3: 1.5}[number])
    assert choose.choose(small(), CPU, fake.clock())
    # On a CPU, attention has only the flash backend. Each candidate is recorded once before its two windows.
    assert fake.order == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]
    table = kernel_table.read(small().table)
    assert table.version == kernel_table.read().version + 1
    attention, gelu = (row for row in table.rows.values() if row.batch == 3)
    assert (attention.choice, attention.windows) == ("flash", {"ours": [2.0, 2.0], "flash": [1.0, 1.0]})
    assert (gelu.choice, gelu.shape, gelu.dtype) == ("ours", "6 tokens, 128 channels", "float32")
    records = [json.loads(line) for line in small().results.read_text().splitlines()]
    assert [record["op"] for record in records] == ["attention", "bias_gelu"]
    assert records[0]["refused"].keys() == {"cudnn", "efficient"}
    out = capsys.readouterr().out
    assert "cudnn was not timed: No viable backend" in out
    assert "2 rows of " in out


@pytest.mark.slow
def test_a_wrong_kernel_gets_no_row(small, monkeypatch, capsys):
    monkeypatch.setattr(choose, "OPS", {"bias_gelu": "bias + GELU"})
    monkeypatch.setattr(choose, "failure", lambda *_: "its error on a small batch is 1.0")
    assert not choose.choose(small(), CPU, FakeClock(lambda number: 1.0).clock())
    assert not small().table.exists()
    assert "ours was not timed: its error on a small batch is 1.0" in capsys.readouterr().out


@pytest.mark.slow
def test_what_rounds_differently_each_time_is_not_timed(small, monkeypatch, capsys):
    """As with attention backends that sum by atomic additions: they are rejected, whatever their speed."""

    def noisy(function, backend):
        return lambda *arguments: tuple(out * (1 + 1e-6 * torch.rand(())) for out in function(*arguments))

    monkeypatch.setattr(choose, "OPS", {"attention": "attention"})
    monkeypatch.setattr(choose, "with_backend", noisy)
    assert choose.choose(small(), CPU, FakeClock(lambda number: 2.0 - number).clock())
    (row,) = (row for row in kernel_table.read(small().table).rows.values() if row.batch == 3)
    assert (row.choice, row.windows) == ("ours", {"ours": [2.0, 2.0]})
    assert "flash was not timed: the bits of its gradients differ from call to call" in capsys.readouterr().out


def test_a_time_limit_names_what_is_left_out(small, capsys):
    assert choose.choose(small(budget=1e-9), CPU, FakeClock(lambda number: 1.0).clock())
    assert "left out, since the budget of 0 s is used up: assemble_tokens, 6 tokens" in capsys.readouterr().out


def test_a_shape_is_measured_once_whatever_its_recipes(small, tmp_path):
    found = cases(Options(), "Card", CPU)
    assert len(found) == 3 * 2 * 4 + 2 * 2  # four operations for each width and number of tokens; two for the heads
    assert next(iter(found)) == ("Card", "assemble_tokens", "197 tokens, 768 channels", "float32")
    assert len(cases(small(recipe=("small", "small")), "Card", CPU)) == len(OPS)
    stored = tmp_path / "recipe.json"
    stored.write_text(json.dumps(Recipe(name="own", model=CFG).resolved().to_dict()))
    own = cases(small(recipe=(str(stored),)), "Card", CPU)
    assert own.keys() == cases(small(), "Card", CPU).keys()
    with pytest.raises(UserError, match="--recipe deit_large is neither a file nor one of deit_tiny"):
        cases(small(recipe=("deit_large",)), "Card", CPU)
    with pytest.raises(UserError, match="trains a resnet18: only a DeiT's operations are measured"):
        cases(small(recipe=("convnet_teacher",)), "Card", CPU)


def test_an_operation_without_gradients_runs_forward_alone():
    inputs = [torch.ones(2, 3), torch.ones(3)]
    assert training_call(lambda x, y: ((x * y).detach(),), inputs)() == ()
    gradients = training_call(lambda x, y: (x * y, (x + y).detach()), inputs)()
    assert [tuple(gradient.shape) for gradient in gradients] == [(2, 3), (3,)]
