"""What a training step does on a GPU: its GEMMs, its passes over memory, and how fast a card does them.

Counted for the step that fastdeit runs on a GPU with its kernels and torch.compile. Every rate has a source, and none
was fitted to the steps that the model of time is compared with (docs/roof.md).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fastdeit.budget.cards import Card
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.plan.drop_path import drop_path_rates, dropped_samples
from fastdeit.sections import ModelConfig

Inputs = Literal["images", "patches"]
Product = Literal["forward", "input gradient", "weight gradient"]

# The parts of a step. `fastdeit.training.profiling.group_of` gives a kernel's part by its name.
GEMM, ATTENTION, LAYER_NORM, GELU, TOKENS = "GEMM", "attention", "LayerNorm", "GELU", "tokens"
SUMS, CASTS, ELEMENTWISE, LOSS = "sums", "casts", "element-wise", "loss"
OPTIMIZER, AVERAGE, COPIES, GAPS = "optimizer", "average", "copies", "gaps"
PARTS = (GEMM, ATTENTION, LAYER_NORM, GELU, TOKENS, SUMS, CASTS, ELEMENTWISE, LOSS, OPTIMIZER, AVERAGE, COPIES, GAPS)

BF16, FP32 = 2, 4  # bytes

# Share of the copy's bandwidth that a pass reaches: 0.85 (token assembly), 0.88 (residual and LayerNorm) and 0.90 (bias
# and GELU) on the H100, each kernel alone (docs/kernels.md).
PASS_SHARE = 0.88
# Share of the datasheet's FLOP/s that attention reaches, forward and backward, of the two and five products that it
# needs at least. On the H100 with DeiT-B's heads it takes 186 and 219 + 298 microseconds at 197 tokens, 995 and 1,015
# + 1,633 at 577 (docs/kernels.md). It is bound by instructions, not by the power that limits a GEMM, so it scales with
# the datasheet. Its tiles are larger above 256 tokens.
ATTENTION_SHARE = {False: (0.166, 0.149), True: (0.266, 0.247)}  # by whether there are more than 256 tokens
# Machine instructions per value, forward and backward: 972 for 32 values and 856 for 16 (docs/kernels.md, "Compiled
# form"); the latter include the start of its loop.
GELU_INSTRUCTIONS = (30, 53)
# Seconds in which a kernel moves nothing yet, or no longer: the shortest kernels of the profiles take 0.8 to 1.2
# microseconds, the shortest GEMMs 2.7 to 5.
KERNEL_START, GEMM_START = 1.0e-6, 3.0e-6
# Rows and columns of cuBLAS's tile of the output on Hopper (`nvjet_sm90_tst_192x192`). Sums over at least `SPLIT_FROM`
# rows are split among programs.
TILE, SPLIT_FROM = 192, 4096
AVERAGE_BYTES = 3 * FP32  # a parameter: the average reads two and writes one


class Update(NamedTuple):
    """What an optimizer costs: bytes moved and held for a parameter beside its weight, gradient and moments; launches.

    AdamW, fused, reads weight, gradient and both moments, and writes three of them. timm's LAMB (from 1.0.31 on) makes
    some 16 passes over all parameters, which read or write 32 values of each; it holds the clipped gradient, the update
    and its divisor. apex's FusedLAMB, by its code and not measured, makes two passes and three norms.
    """

    moved: float
    held: float
    kernels: int


UPDATES = {
    "adamw": Update(7 * FP32, 0, 8),
    "lamb": Update(32 * FP32, 3 * FP32, 60),
    "apex lamb": Update(13 * FP32, 0, 20),
}


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """A product of (m, k) and (k, n) in bf16, `count` times a step.

    The model's time is the larger of its operations and its reads, then its writes: cuBLAS's kernels here give each
    multiprocessor one tile that fills its registers, so nothing is multiplied while a tile is written. A product split
    along k also writes and reads float32 sums, one tile for each multiprocessor.
    """

    name: str
    product: Product
    count: int
    m: int
    n: int
    k: int
    part: str = GEMM

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k

    @property
    def read(self) -> float:
        return BF16 * float(self.m * self.k + self.k * self.n)

    @property
    def written(self) -> float:
        return BF16 * float(self.m * self.n)

    @property
    def split(self) -> bool:
        return self.product == "weight gradient" and self.k >= SPLIT_FROM

    @property
    def bytes(self) -> float:
        return self.read + self.written

    @property
    def kernels(self) -> int:
        return 2 if self.split else 1

    def ideal(self, card: Card) -> float:
        """Seconds at the roof, once."""
        return max(self.flops / card.gemm, self.bytes / card.bandwidth)

    def seconds(self, card: Card) -> float:
        """Seconds by the model, once."""
        sums = 2 * FP32 * card.multiprocessors * TILE**2 if self.split else 0
        start = GEMM_START + (KERNEL_START if self.split else 0.0)
        products = max(self.flops / card.gemm, self.read / card.bandwidth)
        return products + (self.written + sums) / card.bandwidth + start


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Kernels that are bound by memory or by instructions, `count` times a step.

    bytes         read and written, once
    flops         of matrix products, once; `share` of the datasheet's rate is reached
    instructions  of single threads, once
    kernels       launches, once
    """

    part: str
    name: str
    count: int
    bytes: float = 0.0
    flops: float = 0.0
    share: float = 1.0
    instructions: float = 0.0
    kernels: int = 1

    def ideal(self, card: Card) -> float:
        """Seconds at the roof, once."""
        return max(self.bytes / card.bandwidth, self.flops / card.gemm)

    def seconds(self, card: Card) -> float:
        """Seconds by the model, once."""
        bounds = (
            self.bytes / (PASS_SHARE * card.bandwidth),
            self.flops / (self.share * card.peak),
            self.instructions / card.issue,
        )
        return max(bounds) + self.kernels * KERNEL_START


Work = Gemm | Pass


@dataclass(frozen=True)
class Shape:
    """Sizes of a model at a batch; `rows` are the batch's tokens, `few` its prefix tokens."""

    model: ModelConfig
    batch: int
    classes: int

    @property
    def width(self) -> int:
        return self.model.embed_dim

    @property
    def hidden(self) -> int:
        return int(self.width * self.model.mlp_ratio)

    @property
    def heads(self) -> int:
        """Classifiers."""
        return 2 if self.model.distilled else 1

    @property
    def patches(self) -> int:
        return (self.model.img_size // self.model.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        return 3 * self.model.patch_size**2

    @property
    def tokens(self) -> int:
        return self.patches + self.heads

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def few(self) -> int:
        return self.batch * self.heads

    @property
    def forwards(self) -> int:
        """Forward passes over a block; with gradient checkpointing the backward pass makes another."""
        return 2 if self.model.grad_checkpointing else 1

    @property
    def kept(self) -> list[int]:
        """How many samples each block's branches compute."""
        return kept_samples(self.model, self.batch)

    @property
    def layers(self) -> tuple[tuple[str, int, int], ...]:
        """Name, inputs and outputs of a block's linear layers."""
        width, hidden = self.width, self.hidden
        return ("qkv", width, 3 * width), ("proj", width, width), ("fc1", width, hidden), ("fc2", hidden, width)

    @property
    def matrices(self) -> int:
        """Values in weights of linear layers."""
        blocks = self.model.depth * sum(inputs * outputs for _, inputs, outputs in self.layers)
        return blocks + self.patch_values * self.width + self.heads * self.width * self.classes

    @property
    def parameters(self) -> int:
        width = self.width
        norms_and_scales = (4 + 2 * (self.model.layer_scale > 0)) * width
        vectors = self.model.depth * (sum(outputs for _, _, outputs in self.layers) + norms_and_scales)
        positions = self.patches if self.model.no_embed_class else self.tokens
        return self.matrices + vectors + (3 + self.heads + positions) * width + self.heads * self.classes


def kept_samples(model: ModelConfig, batch: int) -> list[int]:
    """How many samples of a batch each block's branches compute, with mixing groups of 64."""
    if model.drop_path_mode == "mask":
        return [batch] * model.depth
    group = min(64, batch)
    rates = drop_path_rates(model.depth, model.drop_path, uniform=model.drop_path_uniform)
    return (batch - batch // group * dropped_samples(rates, group)).tolist()


def gemms(model: ModelConfig, batch: int, *, num_classes: int = 1000) -> list[Gemm]:
    """The GEMMs of a step of a DeiT on `batch` images, forward and backward.

    The last block computes only the prefix tokens after attention. Pixels need no gradient. Raises UserError for
    another `arch`.
    """
    shape = Shape(checked(model), batch, num_classes)
    # Name, times a step, rows, inputs, outputs.
    forward = [("patch embedding", 1, batch * shape.patches, shape.patch_values, shape.width)]
    for name, inputs, outputs in shape.layers:
        whole = shape.kept if name == "qkv" else shape.kept[:-1]
        forward += [(name, count, kept * shape.tokens, inputs, outputs) for kept, count in Counter(whole).items()]
        if name != "qkv":
            forward.append((f"{name}, last block", 1, shape.kept[-1] * shape.heads, inputs, outputs))
    forward.append(("head", shape.heads, batch, shape.width, num_classes))
    out: list[Gemm] = []
    for name, count, rows, inputs, outputs in forward:
        # A second forward pass over a block ends at the input of its last layer.
        times = shape.forwards if name.partition(",")[0] in ("qkv", "proj", "fc1") else 1
        out.append(Gemm(name=name, product="forward", count=count * times, m=rows, n=outputs, k=inputs))
        if name != "patch embedding":
            out.append(Gemm(name=name, product="input gradient", count=count, m=rows, n=inputs, k=outputs))
        out.append(Gemm(name=name, product="weight gradient", count=count, m=outputs, n=inputs, k=rows))
    return [gemm for gemm in out if gemm.count]


def passes(
    model: ModelConfig,
    batch: int,
    *,
    num_classes: int = 1000,
    inputs: Inputs = "images",
    ema: bool = False,
    optimizer: str = "adamw",
) -> list[Pass]:
    """Everything but the GEMMs: see `predict`. Raises UserError for another `arch`."""
    shape = Shape(checked(model), batch, num_classes)
    stream = BF16 if model.residual_dtype == "bfloat16" else FP32
    work = _gelu(shape) + _attention(shape) + _layer_norm(shape, stream) + _sums(shape)
    work += _weights(shape, ema, optimizer)
    return [each for each in work + _borders(shape, stream, inputs) if each.count]


def _blocks(shape: Shape) -> list[tuple[int, int, int, str]]:
    """Groups of equal blocks: samples, tokens of the results, number of blocks, and a suffix for names."""
    others = [(kept, shape.tokens, count, "") for kept, count in Counter(shape.kept[:-1]).items()]
    return [*others, (shape.kept[-1], shape.heads, 1, ", last block")]


def _attention(shape: Shape) -> list[Pass]:
    forward, backward = ATTENTION_SHARE[shape.tokens > 256]
    out = []
    for kept, tokens, count, where in _blocks(shape):
        # Forward reads queries, keys and values and writes the result. Backward reads these four and the result's
        # gradient, and writes three gradients. In the last block only the prefix tokens have a result.
        values, own = kept * shape.tokens * shape.width, kept * tokens * shape.width
        flops = 2.0 * own * shape.tokens  # of one product, over all heads
        moved = BF16 * (3 * values + own), BF16 * (6 * values + 2 * own)
        out += [
            Pass(
                part=ATTENTION,
                name=f"forward{where}",
                count=count * shape.forwards,
                bytes=moved[0],
                flops=2 * flops,
                share=forward,
            ),
            Pass(
                part=ATTENTION,
                name=f"backward{where}",
                count=count,
                bytes=moved[1],
                flops=5 * flops,
                share=backward,
                kernels=2,
            ),
        ]
    return out


def _layer_norm(shape: Shape, stream: int) -> list[Pass]:
    """`stream`: bytes of a value of the residual stream."""
    out, kept = [], [*shape.kept, shape.batch]
    # The MLP reads the normalisation after attention; the next block's attention or the head reads that after the MLP.
    pairs = Counter(pair for i in range(len(kept) - 2) for pair in ((kept[i], kept[i]), (kept[i], kept[i + 1])))
    sites = [(pair, shape.rows, shape.tokens, count, "") for pair, count in pairs.items()]
    last = Counter(((kept[-2], kept[-2]), (kept[-2], kept[-1])))
    sites += [(pair, shape.few, shape.heads, count, ", last block") for pair, count in last.items()]
    for number, ((branch, following), rows, tokens, count, where) in enumerate(sites, 1):
        # Forward reads the stream and a branch, writes the sum and its normalisation. Backward reads two gradients and
        # the sum, and writes two gradients; with LayerScale it reads the branch as well.
        both = BF16 * (branch + following) * tokens * shape.width
        forward, backward = (n * stream * rows * shape.width + both for n in (2, 3))
        if shape.model.layer_scale:
            backward += BF16 * branch * tokens * shape.width
        # The last one is after all blocks, and so is not computed again.
        times = count * shape.forwards - (shape.forwards - 1) * (number == len(sites))
        out.append(Pass(part=LAYER_NORM, name=f"with residual, forward{where}", count=times, bytes=forward))
        out.append(Pass(part=LAYER_NORM, name=f"with residual, backward{where}", count=count, bytes=backward))
    values = shape.rows * shape.width
    out.append(Pass(part=LAYER_NORM, name="first, forward", count=shape.forwards, bytes=values * (stream + BF16)))
    out.append(Pass(part=LAYER_NORM, name="first, backward", count=1, bytes=values * (2 * stream + BF16)))
    return out


def _gelu(shape: Shape) -> list[Pass]:
    out = []
    for kept, tokens, count, where in _blocks(shape):
        values = kept * tokens * shape.hidden
        passes_over = ("forward", shape.forwards, 2), ("backward", 1, 3)
        for (name, times, tensors), each in zip(passes_over, GELU_INSTRUCTIONS, strict=True):
            work = {"bytes": tensors * BF16 * values, "instructions": float(each * values)}
            out.append(Pass(part=GELU, name=f"{name}{where}", count=count * times, **work))
    return out


def _sums(shape: Shape) -> list[Pass]:
    """The second stage of sums that other kernels begin, such as the gradients of biases."""
    depth = shape.model.depth
    attention = shape.batch * -(-shape.tokens // 64) * 3 * FP32 * shape.width  # of programs with 64 queries
    out = [
        Pass(part=SUMS, name="bias of the heads", count=shape.heads, kernels=2),
        Pass(part=SUMS, name="of attention", count=depth, bytes=attention),
    ]
    norm = 528 * 3 * FP32 * shape.width  # of at most 528 programs; weight, bias and the branch's bias
    gelu = -(-shape.rows // 256) * FP32 * shape.hidden  # of programs with 256 rows
    tokens = -(-shape.batch // 64) * FP32 * shape.tokens * shape.width  # of programs with 64 samples
    out.append(Pass(part=SUMS, name="of LayerNorm", count=2 * depth + 1, bytes=norm))
    out.append(Pass(part=SUMS, name="of bias and GELU", count=depth - (shape.few <= 256), bytes=gelu))
    out.append(Pass(part=SUMS, name="of token assembly", count=1, bytes=tokens, kernels=3))
    return out


def update_of(optimizer: str) -> Update:
    return UPDATES.get(optimizer, UPDATES["adamw"])


def _weights(shape: Shape, ema: bool, optimizer: str) -> list[Pass]:
    """Passes over the parameters."""
    depth, count = shape.model.depth, shape.parameters
    matrices, update = 4 * depth + 1 + shape.heads, update_of(optimizer)
    moved = shape.matrices * (FP32 + BF16)
    # torch.compile casts each weight in a kernel of its own, and each bias that a GEMM adds.
    out = [
        Pass(part=CASTS, name="of weights", count=1, bytes=moved, kernels=matrices),
        Pass(part=CASTS, name="of biases", count=1, kernels=3 * depth + shape.heads),
        Pass(part=CASTS, name="of weight gradients", count=1, bytes=moved, kernels=matrices),
        Pass(part=OPTIMIZER, name=optimizer, count=1, bytes=update.moved * count, kernels=update.kernels),
    ]
    return [*out, Pass(part=AVERAGE, name="EMA", count=1, bytes=AVERAGE_BYTES * count, kernels=4)] if ema else out


def _borders(shape: Shape, stream: int, inputs: Inputs) -> list[Pass]:
    """Everything before the first block and after the last one; `stream` as in `_layer_norm`."""
    values, pixels = shape.rows * shape.width, shape.batch * shape.patches * shape.patch_values
    patches = shape.batch * shape.patches * shape.width
    logits = shape.few * shape.classes
    each = FP32 if inputs == "images" else BF16
    images = 1 if inputs == "images" else 0
    products = sum(gemm.count for gemm in gemms(shape.model, shape.batch) if max(gemm.m, gemm.k) >= SPLIT_FROM)
    return [
        Pass(part=TOKENS, name="forward", count=1, bytes=BF16 * patches + stream * values),
        Pass(part=TOKENS, name="backward", count=1, bytes=BF16 * patches + stream * values),
        # The first block's input has a gradient from the stream and one from its LayerNorm.
        Pass(part=TOKENS, name="sum of both gradients", count=1, bytes=3 * stream * values),
        # The last block continues with the prefix tokens; the gradients of all others are zeros.
        Pass(part=ELEMENTWISE, name="zero gradients, stream", count=1, bytes=stream * values),
        # Mode `skip` needs more kernels, to number the kept samples.
        Pass(part=ELEMENTWISE, name="others", count=1, kernels=16 if shape.model.drop_path_mode == "skip" else 12),
        # Logits are read forward, read backward, and their gradients are written.
        Pass(part=LOSS, name="loss", count=1, bytes=3 * BF16 * logits, kernels=4),
        Pass(part=COPIES, name="batch into the graph's memory", count=1, bytes=2 * each * pixels, kernels=9),
        Pass(part=COPIES, name="images to bf16 patches", count=images, bytes=(FP32 + BF16) * pixels),
        # cuBLAS clears a counter before each backward GEMM over many rows.
        Pass(part=COPIES, name="memset", count=1, kernels=products * 2 // 3),
    ]


def checked(model: ModelConfig) -> ModelConfig:
    if model.arch != "deit":
        raise UserError(f"the step-time model knows the arch 'deit', not '{model.arch}'")
    return model
