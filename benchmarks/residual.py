"""`python -m benchmarks residual`: how much accuracy a bf16 residual stream costs, on Fashion-MNIST.

It trains a small DeiT, as deep as the real ones, with each residual dtype and several seeds. The CPU computes in
float32 and rounds to bf16 wherever a GPU under autocast does; this is much faster than the CPU's own bf16.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from benchmarks.record import RESULTS, append, environment
from fastdeit.cli import parse, run
from fastdeit.config import Recipe
from fastdeit.distributed import world
from fastdeit.model.deit import DeiT
from fastdeit.recipes import fashion_mnist_distilled
from fastdeit.training.trainer import Trainer

Residual = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train with both residual dtypes, and compare the accuracies of the class token."""

    train: Path  # Fashion-MNIST's training images, converted; some of them are enough
    val: Path  # its test images, converted
    seeds: int = 3
    epochs: int = 10
    output: Path = Path("runs/residual")  # a folder for the runs; the same command resumes them
    results: Path = RESULTS / "residual.jsonl"


class _Round(torch.autograd.Function):
    """Round a tensor and its gradient to bf16, as storing both in bf16 would."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.bfloat16().float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].bfloat16().float()


def _round(x: Tensor) -> Tensor:
    return _Round.apply(x)  # pyright: ignore[reportReturnType]


def _round_product(layer: Any) -> None:
    def forward(x: Tensor) -> Tensor:
        values = _round(x), _round(layer.weight), _round(layer.bias)
        product = F.linear(*values) if isinstance(layer, nn.Linear) else F.conv2d(*values, stride=layer.stride)
        return _round(product)

    layer.forward = forward


def _round_stream(block: Any) -> None:
    def forward(x: Tensor) -> Tensor:
        x = _round(x + block.drop_path1(block.attn(block.norm1(x))))
        return _round(x + block.drop_path2(block.mlp(block.norm2(x))))

    block.forward = forward


def emulate_bf16(model: DeiT, residual: Residual) -> None:
    """Make a float32 model round as under autocast to bf16, and also its residual stream if `residual` is "bfloat16".

    Inputs, weights and results of every product are rounded, and so are their gradients. Normalisation, softmax and the
    sums inside a product stay in float32, as in the kernels.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            _round_product(module)
        elif isinstance(module, Block) and residual == "bfloat16":
            _round_stream(module)
    if residual == "bfloat16":
        assemble: Any = model._assemble
        model._assemble = lambda pixels: _round(assemble(pixels))  # pyright: ignore[reportAttributeAccessIssue]


def recipe(options: Options, residual: Residual, seed: int) -> Recipe:
    """A DeiT of 12 blocks on 49 patches, without a teacher."""
    replace, base = dataclasses.replace, fashion_mnist_distilled()
    return replace(
        base,
        name=f"residual_{residual}",
        model=replace(base.model, embed_dim=64, depth=12, num_heads=2, drop_path=0.1, distilled=False),
        objective=replace(base.objective, distillation="none"),
        data=replace(base.data, train=options.train, val=options.val),
        ema=replace(base.ema, enabled=False),
        run=replace(
            base.run,
            epochs=options.epochs,
            eval_every=options.epochs,
            seed=seed,
            precision="fp32",
            device="cpu",
            tensorboard=False,
            output=options.output / f"{residual}-{seed}",
        ),
    )


def train(options: Options, residual: Residual, seed: int) -> dict[str, float]:
    """Top-1 and loss on the test images after training."""
    with world("cpu") as joined:
        trainer = Trainer(recipe(options, residual, seed).resolved(), joined)
        assert isinstance(trainer.model, DeiT)
        emulate_bf16(trainer.model, residual)
        scores = trainer.run()["model"]["class"]
    return {"top1": scores["top1"], "loss": scores["loss"]}


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(Options, prog="python -m benchmarks residual", args=argv)
    scores: dict[str, list[dict[str, float]]] = {"float32": [], "bfloat16": []}
    for seed in range(options.seeds):
        for residual in ("float32", "bfloat16"):
            scores[residual].append(train(options, residual, seed))
            last = scores[residual][-1]
            print(f"seed {seed}, residual stream {residual}: top-1 {last['top1']:.2f}, loss {last['loss']:.4f}")
    record = {"epochs": options.epochs, "scores": scores, "environment": environment()}
    append(options.results, record)
    top1 = {residual: [score["top1"] for score in runs] for residual, runs in scores.items()}
    differences = [b - a for a, b in zip(top1["float32"], top1["bfloat16"], strict=True)]
    for residual, values in top1.items():
        spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        print(f"{residual}: top-1 {statistics.mean(values):.2f}{spread}")
    spread = f" +- {statistics.stdev(differences):.2f}" if len(differences) > 1 else ""
    print(f"bfloat16 minus float32: {statistics.mean(differences):+.2f}{spread}")


if __name__ == "__main__":
    run(main)
