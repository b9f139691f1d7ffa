"""Pictures of a run: that they are drawn from what the log says, and that a cut-off log is read."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastdeit.model.deit import token_cosines
from fastdeit.training import plots
from fastdeit.training.log_lines import read_log, without_repeats
from refusals import refused


def write_log(path, events, tail=""):
    path.write_text("".join(json.dumps(e) + "\n" for e in events) + tail)


def train_event(step, **fields):
    return {
        "event": "train", "global_step": step, "loss": 3.0 / step, "loss_base": 1.0, "loss_distill": 0.5, "lr": 1e-3,
        **fields,
    }  # fmt: skip


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    log = tmp_path / "log.jsonl"
    write_log(log, [train_event(1), train_event(2)], tail='{"event": "tra')
    assert [e["global_step"] for e in read_log(log)] == [1, 2]
    log.write_text('{"event": "tra\n' + json.dumps(train_event(1)) + "\n")
    refused(r"log\.jsonl, line 1", read_log, log)


def test_steps_done_twice_are_drawn_once():
    events = [train_event(1), train_event(2, loss=9.0), train_event(2, loss=1.0)]
    assert [e["loss"] for e in without_repeats(events, "train")] == [3.0, 1.0]


@pytest.mark.slow
def test_curves(tmp_path):
    head = {"top1": 50.0, "top5": 90.0, "loss": 1.0}
    events = [train_event(s) for s in range(1, 20)]
    events += [
        {"event": "eval", "epoch": e, "global_step": 10 * e, "weights": w, "class": head, "distillation": head}
        for e in (0, 1)
        for w in ("model", "ema")
    ]
    write_log(tmp_path / "log.jsonl", events)
    plots.curves(tmp_path / "log.jsonl", tmp_path / "curves.png", teacher_top1=70.0)
    assert np.asarray(Image.open(tmp_path / "curves.png")).std() > 5


@pytest.mark.slow
def test_contact_sheet_undoes_the_normalisation(tmp_path):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 8, 8)
    images = ((red - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)).expand(10, 3, 8, 8)
    plots.contact_sheet(images, mean, std, tmp_path / "sheet.png", ["x"] * 10)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(1).mean() > 0.2


@pytest.mark.slow
def test_cosine_of_the_tokens(tmp_path):
    from sklearn.metrics.pairwise import cosine_similarity  # here: it takes two seconds

    tokens = [torch.randn(5, 2, 16) for _ in range(4)]
    plots.token_cosine(tokens, tmp_path / "tokens.png")
    for value, layer in zip(token_cosines(tokens), tokens, strict=True):
        judge = np.diag(cosine_similarity(layer[:, 0].numpy(), layer[:, 1].numpy())).mean()
        assert value == pytest.approx(judge, abs=1e-5)
    assert (tmp_path / "tokens.png").stat().st_size > 1000
