"""GPUs as the step-time model sees them: what they copy and multiply a second."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fastdeit.pipelines.errors import UserError

# What Hopper reaches of its datasheet, for cards on which nothing was measured: the H200 copies 4.3 of 4.8 TB/s and
# multiplies at 790 of 989 TFLOP/s. An assumption for other architectures.
COPY_SHARE, GEMM_SHARE = 0.90, 0.80


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU.

    bandwidth        bytes per second of a device copy, read and written
    gemm             FLOP per second of a large bf16 GEMM
    peak             FLOP per second of the datasheet, bf16, dense, sums in float32
    multiprocessors  how many
    clock            at which the datasheet computes `peak`, Hz
    memory           bytes
    watts            the limit of its power, which training reaches
    link             bytes per second, each way, to the other GPUs of its machine: NVLink, or PCIe
    measured         whether `bandwidth` and `gemm` were measured; otherwise they are shares of the datasheet
    source           of the figures
    """

    name: str
    bandwidth: float
    gemm: float
    peak: float
    multiprocessors: int
    clock: float
    memory: float
    watts: float
    link: float
    measured: bool
    source: str

    @property
    def issue(self) -> float:
        """Instructions of single threads a second: each multiprocessor starts four warps of 32 threads a cycle."""
        return self.multiprocessors * 128 * self.clock


def _from_datasheet(name: str, source: str, *, bandwidth: float, peak: float, **figures: Any) -> Card:
    shares = {"bandwidth": COPY_SHARE * bandwidth, "gemm": GEMM_SHARE * peak}
    return Card(name=name, peak=peak, measured=False, source=source, **shares, **figures)


# NVIDIA H100 and H200 datasheets, SXM.
_HOPPER: dict[str, Any] = {"peak": 989e12, "multiprocessors": 132, "clock": 1.83e9, "watts": 700, "link": 450e9}

CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card(
            name="H200",
            bandwidth=4.3e12,
            gemm=790e12,
            memory=141e9,
            measured=True,
            source="plain PyTorch: a copy of 1 GiB, and a large GEMM",
            **_HOPPER,
        ),
        Card(
            name="H100",
            bandwidth=3.0e12,
            gemm=720e12,  # another H100 gave 798
            memory=80e9,
            measured=True,
            source="SXM, 80 GB; `python -m benchmarks kernels`, commit 5dada37",
            **_HOPPER,
        ),
        _from_datasheet(
            "A100",
            "NVIDIA A100 datasheet, SXM, 80 GB",
            bandwidth=2.039e12,
            peak=312e12,
            multiprocessors=108,
            clock=1.41e9,
            memory=80e9,
            watts=400,
            link=300e9,
        ),
        _from_datasheet(
            "B200",
            "NVIDIA HGX B200 datasheet, 1,000 W, per GPU",
            bandwidth=8.0e12,
            peak=2_250e12,
            multiprocessors=148,
            clock=1.856e9,
            memory=180e9,
            watts=1000,
            link=900e9,
        ),
        _from_datasheet(
            "L40S",
            "NVIDIA L40S datasheet",
            bandwidth=0.864e12,
            peak=362e12,
            multiprocessors=142,
            clock=2.49e9,
            memory=48e9,
            watts=350,
            link=32e9,
        ),
        _from_datasheet(
            "RTX 4090",
            "NVIDIA Ada GPU architecture whitepaper, appendix A",
            bandwidth=1.008e12,
            peak=165.2e12,
            multiprocessors=128,
            clock=2.52e9,
            memory=24e9,
            watts=450,
            link=32e9,
        ),
    )
}


def find_card(name: str) -> Card:
    """The card of `CARDS` that `name` names: its key, or PyTorch's name such as "NVIDIA H100 80GB HBM3".

    It does not tell the PCIe form of a card from its SXM form, whose figures the table has. Raises UserError for an
    unknown card.
    """
    for key, card in CARDS.items():
        # "RTX 4090" is also "rtx4090"; a GH200 is no H200.
        if re.search(rf"(?<![a-z0-9]){key.lower().replace(' ', ' ?')}(?![0-9])", name.lower()):
            return card
    raise UserError(f"there is no card '{name}' in the table: choose one of {', '.join(CARDS)}")
