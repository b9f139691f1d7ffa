"""The benchmark of the residual stream: its rounding, compared with PyTorch's bf16, and a run of one epoch."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import residual
from fastdeit.model.deit import DeiT
from fastdeit.pipelines.conversion.convert import convert


def model(stream):
    torch.manual_seed(0)
    return DeiT(
        img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5, residual_dtype=stream
    ).train()


def gradients(network, pixels, *, autocast):
    network = copy.deepcopy(network)
    if not autocast:
        residual.emulate_bf16(network, "bfloat16" if network._residual_dtype is torch.bfloat16 else "float32")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = network(pixels).cls
    logits.float().square().sum().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()]), logits.float()


def draw_digit(number, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (28, 28), dtype=np.uint8)).save(path)


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("stream", ["float32", "bfloat16"])
def test_rounds_like_autocast(stream):
    network, pixels = model(stream), torch.randn(32, 3, 16, 16)
    autocast, emulated = gradients(network, pixels, autocast=True), gradients(network, pixels, autocast=False)
    exact = copy.deepcopy(network)
    logits = exact(pixels).cls
    logits.square().sum().backward()
    truth = torch.cat([p.grad.flatten() for p in exact.parameters()]), logits
    for theirs, ours, exactly in zip(autocast, emulated, truth, strict=True):
        error = difference(theirs, exactly)
        assert difference(ours, exactly) == pytest.approx(error, rel=0.2)
        assert difference(ours, theirs) < 1.2 * error  # independent errors would give about 1.4


def test_rounds_the_stream_only_if_asked():
    pixels, seen = torch.randn(2, 3, 16, 16), {}
    for stream in ("float32", "bfloat16"):
        network = model("float32")
        residual.emulate_bf16(network, stream)
        network.blocks[1].norm1.register_forward_pre_hook(lambda _, inputs, name=stream: seen.update({name: inputs[0]}))
        network(pixels)
    assert torch.equal(seen["bfloat16"], seen["bfloat16"].bfloat16().float())
    assert not torch.equal(seen["float32"], seen["float32"].bfloat16().float())


@pytest.mark.slow
def test_trains_with_both_and_records(tmp_path, capsys):
    for split in ("train", "val"):
        for number in range(256):
            draw_digit(number, tmp_path / split / f"class{number % 10}" / f"{number}.png")
        convert(str(tmp_path / split), tmp_path / f"{split}.beton", progress=False)
    places = {"output": "runs", "results": "r.jsonl", "train": "train.beton", "val": "val.beton"}
    words = [word for name, file in places.items() for word in (f"--{name}", str(tmp_path / file))]
    residual.main([*words, "--seeds", "1", "--epochs", "1"])
    record = json.loads((tmp_path / "r.jsonl").read_text())
    losses = [record["scores"][name][0]["loss"] for name in ("float32", "bfloat16")]
    assert 0 < losses[0] != losses[1] > 0
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert "bfloat16 minus float32" in capsys.readouterr().out
