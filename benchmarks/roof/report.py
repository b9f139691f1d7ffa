"""The step-time model as tables, beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.profiles import by_group, kernels_of
from benchmarks.render import Record, Table
from fastdeit.budget.cards import Card
from fastdeit.budget.step import StepTime
from fastdeit.budget.work import GAPS, Gemm


@dataclass(frozen=True)
class Forecast:
    """A model on a card: the prediction, and what was measured of the same step.

    profile     the newest record of `profiles.jsonl`, or None
    throughput  images per second and commit of the newest record of `throughput.jsonl`, or None
    """

    model: str
    card: Card
    step: StepTime
    profile: Record | None = None
    throughput: tuple[float, str] | None = None


def summary_table(forecasts: Sequence[Forecast]) -> Table:
    """One row for each forecast: images per second."""
    rows = []
    for forecast in forecasts:
        step, measured = forecast.step, measured_rate(forecast)
        cells = [forecast.model, forecast.card.name, f"{1e3 * step.seconds:.2f}", f"{step.images_per_second:,.0f}"]
        cells.append(f"{step.images / step.ideal:,.0f}")
        if measured is not None:
            rate, commit = measured
            cells += [f"{rate:,.0f}", commit, _error(step.images_per_second, rate)]
        rows.append(cells)
    return Table(
        title="Training step: the model, every part at the roof, and measured.",
        columns=("", "card", "ms", "im/s", "at the roof", "measured", "commit", "model's error"),
        align="llrrrrlr",
        rows=rows,
        notes=[card_note(card) for card in dict.fromkeys(forecast.card for forecast in forecasts)],
    )


def measured_rate(forecast: Forecast) -> tuple[float, str] | None:
    """Images per second and commit of what was measured last, if anything was."""
    profile = forecast.profile
    if profile is None:
        return forecast.throughput
    rate = 1e3 * forecast.step.images / profile["ms_per_step"]
    return rate, str(profile["environment"]["commit"])[:7]


def card_note(card: Card) -> str:
    """The figures of a card and their source."""
    how = "measured" if card.measured else "assumed shares of the datasheet"
    figures = f"{card.bandwidth / 1e12:.2f} TB/s copied, {card.gemm / 1e12:.0f} TFLOP/s in bf16 GEMMs, {how}"
    return f"{card.name}: {figures} ({card.source})"


def part_table(forecast: Forecast) -> Table:
    """Milliseconds of every part by the model and at the roof, and measured, if there is a profile."""
    step, profile = forecast.step, forecast.profile
    measured = {} if profile is None else _measured_parts(profile)
    names = [*step.parts, *(name for name in measured if name not in step.parts)]
    rows = []
    for name in names:
        part = step.parts.get(name)
        row = [name, "", "", ""]
        if part is not None:
            row = [name, f"{part.launches}" if part.launches else "", *_ms(part.seconds, part.ideal)]
        if name in measured:
            launches, seconds = measured[name]
            row += [f"{launches:.0f}" if launches else "", *_ms(seconds)]
            row += [_error(part.seconds, seconds)] if part is not None else []
        rows.append(row)
    total = ["step", f"{step.launches}", *_ms(step.seconds, step.ideal)]
    if profile is not None:
        launches = sum(launches for launches, _ in measured.values())
        seconds = profile["ms_per_step"] / 1e3
        total += [f"{launches:.0f}", *_ms(seconds), _error(step.seconds, seconds)]
    notes = [card_note(forecast.card)]
    if step.host:
        notes.append(f"host without a graph: {1e3 * step.host:.2f} ms a step; a step takes the longer of both")
    if profile is not None:
        where = profile["environment"]
        versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "triton"))
        notes.append(
            f"measured: {where['gpu']['name']}, driver {where['gpu']['driver']}, {versions}, commit "
            f"{str(where['commit'])[:7]}, {profile['form']}; its gaps: the step without the profiler, less the kernels"
        )
    columns = ("part", "launches", "model ms", "at the roof", "measured launches", "measured ms", "model's error")
    width = 7 if profile is not None else 4
    return Table(
        title=f"{forecast.model}, {forecast.card.name}, batch {step.images}: where a training step's time goes.",
        columns=columns[:width],
        align="lrrrrrr"[:width],
        rows=[*rows, total],
        notes=notes,
    )


def gemm_table(name: str, gemms: Sequence[Gemm], card: Card) -> Table:
    """Every GEMM of a step: shape, floor and time by the model."""
    rows = []
    for gemm in sorted(gemms, key=lambda gemm: -gemm.count * gemm.seconds(card)):
        bound = "operations" if gemm.flops / card.gemm >= gemm.bytes / card.bandwidth else "bytes"
        once = gemm.seconds(card)
        sizes = (f"{gemm.m:,}", f"{gemm.n:,}", f"{gemm.k:,}")
        work = (f"{gemm.flops / 1e9:.1f}", f"{gemm.bytes / 1e6:.1f}", bound)
        times = (f"{1e6 * gemm.ideal(card):.1f}", f"{1e6 * once:.1f}", f"{1e3 * gemm.count * once:.2f}")
        rate = f"{gemm.flops / once / 1e12:.0f}"
        rows.append((gemm.name, gemm.product, f"{gemm.count}", *sizes, *work, *times, rate))
    columns = ("layer", "product", "times", "M", "N", "K", "GFLOP", "MB", "bound by")
    flops = sum(gemm.count * gemm.flops for gemm in gemms)
    spent = sum(gemm.count * gemm.seconds(card) for gemm in gemms)
    return Table(
        title=f"GEMMs of {name}, {card.name}",
        columns=(*columns, "us at the roof", "us", "ms a step", "TFLOP/s"),
        align="llrrrrrrlrrrr",
        rows=rows,
        notes=[f"{flops / 1e12:.2f} TFLOP a step, at {flops / spent / 1e12:.0f} TFLOP/s by the model"],
    )


def _measured_parts(profile: Record) -> dict[str, tuple[float, float]]:
    """Launches and seconds of each part, the longest first; the gaps last."""
    groups = by_group(kernels_of(profile)).values()
    parts = {group.name: (group.launches, group.microseconds / 1e6) for group in groups}
    busy = sum(seconds for _, seconds in parts.values())
    ordered = dict(sorted(parts.items(), key=lambda item: -item[1][1]))
    return {**ordered, GAPS: (0.0, profile["ms_per_step"] / 1e3 - busy)}


def _ms(*seconds: float) -> list[str]:
    return [f"{1e3 * value:.2f}" for value in seconds]


def _error(model: float, measured: float) -> str:
    return f"{100 * (model / measured - 1):+.0f}%"
