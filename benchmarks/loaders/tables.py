"""The records of the loader benchmark as text, as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.loaders.peers.stream import COMPLETE

Record = dict[str, Any]
PEER = "timm"
_OURS = "fastdeit-"
# On an H200 with 16 cores: training samples, of which a third are decoded.
SAMPLES_PER_SECOND = {"fastdeit-dali-x3-gpu": 25_000.0}
_COLOURS = ("#1f6fb4", "#d9822b", "#2f8f4e", "#7a4fa3", "#b03a48", "#7a7a7a", "#5b8c9c", "#a08030")


def verdicts(record: Record) -> list[dict[str, Any]]:
    """What was aimed at with this record: `text` with what was measured, and whether it was `reached`."""
    found = []
    for name, wanted in SAMPLES_PER_SECOND.items():
        if name in record["sides"]:
            rate = record["sides"][name]["images_per_second"]
            text = f"{name}: {rate:,.0f} samples/s of at least {wanted:,.0f}"
            found.append({"text": text, "reached": rate >= wanted})
    return found


def report(record: Record) -> str:
    """A record for the terminal."""
    lines = [
        f"{_case(record)}, {record['images']} JPEGs of {record['mean_bytes'] / 1000:.0f} kB, "
        f"load {record['load_before']:.1f} before",
        f"{'':20}{'im/s':>8}{'spread':>8}{'CPU ms':>8}{'MiB':>8}{'/ ' + PEER:>8}  work",
    ]
    for name, figures in _fastest_first(record):
        lines.append(
            f"{name:20}{figures['images_per_second']:8.0f}{figures['spread']:8.0%}{figures['cpu_ms_per_image']:8.2f}"
            f"{figures['peak_memory_mib']:8.0f}{_ratio(record, name):>8}  {figures['work']}"
        )
    lines += [f"{name}: missing: {reason}" for name, reason in record["missing"].items()]
    lines += [f"{name}: failed: {reason}" for name, reason in record["failed"].items()]
    lines += [f"{name}: {remark}" for name, figures in record["sides"].items() for remark in figures["remarks"]]
    lines += [f"target {'reached' if v['reached'] else 'MISSED'}: {v['text']}" for v in verdicts(record)]
    return "\n".join(lines)


def table(record: Record) -> list[str]:
    """Lines of Markdown: what was measured on what, a row a side, and what its figures leave out."""
    lines = [
        f"{_case(record)}, {record['images']} JPEGs of {record['mean_bytes'] / 1000:.0f} kB, longest side "
        f"{record['photo_side']}; median of the windows.",
        "",
        f"| loader | work | images/s | / {PEER} | CPU ms an image | peak MiB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for side, figures in _fastest_first(record):
        lines.append(
            f"| {side} | {figures['work']} | {figures['images_per_second']:,.0f} | {_ratio(record, side)} "
            f"| {figures['cpu_ms_per_image']:.2f} | {figures['peak_memory_mib']:,.0f} |"
        )
    for reasons in (record["missing"], record["failed"]):
        lines += [f"| {side} | {reason} | | | | |" for side, reason in reasons.items()]
    remarks = [f"- {side}: {remark}" for side, figures in record["sides"].items() for remark in figures["remarks"]]
    if record["photos_not_reduced"]:
        remarks.append(f"- {record['photos_not_reduced']} photographs were no larger and are as they were")
    return [*lines, "", *remarks]


def scaling(records: Sequence[Record]) -> list[str]:
    """Lines of Markdown: rates by thread count of records that differ in nothing else; none for fewer than two.

    The gain is what an added core brings, as a share of the first count's rate per core.
    """
    records = sorted(records, key=lambda record: record["threads"])
    if len(records) < 2:
        return []
    counts = [record["threads"] for record in records]
    heads = [f"{count} thread" + "s" * (count > 1) for count in counts]
    lines = [
        f"Images/s by threads and cores, {_what(records[0])}; in brackets what each added core brings, of one core's.",
        "",
        f"| loader | {' | '.join(heads)} |",
        f"|---|{'---:|' * len(counts)}",
    ]
    for side in dict.fromkeys(side for record in reversed(records) for side, _ in _fastest_first(record)):
        rates = [record["sides"].get(side, {}).get("images_per_second") for record in records]
        cells = ["" if rates[0] is None else f"{rates[0]:,.0f}"]
        for (less, more), (before, after) in zip(pairwise(counts), pairwise(rates), strict=True):
            gain = ""
            if rates[0] is not None and before is not None and after is not None:
                gain = f" ({(after - before) / (more - less) / (rates[0] / counts[0]):.2f})"
            cells.append("" if after is None else f"{after:,.0f}{gain}")
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return lines


def groups(records: Iterable[Record]) -> list[list[Record]]:
    """Records that differ in the number of threads only, together."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        key = tuple(record[name] for name in ("batch", "cache", "images", "mean_bytes"))
        found.setdefault(key, []).append(record)
    return list(found.values())


def plot(name: str, records: Sequence[Record], path: Path) -> None:
    """Bars of every side at the most threads, and lines over the threads where there are several counts, as a picture.

    name     of the machine
    records  that differ in the number of threads only
    """
    from matplotlib.figure import Figure

    records = sorted(records, key=lambda record: record["threads"])
    last, several = records[-1], len(records) > 1
    sides = sorted(last["sides"], key=lambda side: last["sides"][side]["images_per_second"])
    figure = Figure(figsize=(13 if several else 8, 1.4 + 0.36 * len(sides)), layout="constrained")
    axes = figure.subplots(1, 1 + several, squeeze=False)[0]
    rates = [last["sides"][side]["images_per_second"] for side in sides]
    low = [rate - min(last["sides"][side]["windows"]) for side, rate in zip(sides, rates, strict=True)]
    high = [max(last["sides"][side]["windows"]) - rate for side, rate in zip(sides, rates, strict=True)]
    colours = [_COLOURS[0] if side.startswith(_OURS) else "#7a7a7a" for side in sides]
    bars = axes[0].barh(sides, rates, xerr=(low, high), color=colours, error_kw={"lw": 1, "ecolor": "#222222"})
    for bar, side in zip(bars, sides, strict=True):
        if last["sides"][side]["work"] != COMPLETE:
            bar.set(hatch="///", edgecolor="white")
    edges = [rate + more for rate, more in zip(rates, high, strict=True)]
    for place, (rate, edge) in enumerate(zip(rates, edges, strict=True)):
        axes[0].text(edge + 0.01 * max(edges), place, f"{rate:,.0f}", va="center", fontsize=8)
    axes[0].set(xlabel="images per second (whiskers: all windows; hatched: less work)", title=_case(last))
    axes[0].set_xlim(0, 1.12 * max(edges))
    if several:
        both = [side for side in reversed(sides) if sum(side in record["sides"] for record in records) > 1]
        for number, side in enumerate(both):
            points = [
                (record["threads"], record["sides"][side]["images_per_second"])
                for record in records
                if side in record["sides"]
            ]
            style = "o-" if side.startswith(_OURS) else "s--"
            axes[1].plot(*zip(*points, strict=True), style, ms=4, color=_COLOURS[number % len(_COLOURS)], label=side)
        axes[1].set(xlabel="threads and cores", ylabel="images per second", title="Scaling", ylim=(0, None))
        axes[1].set_xticks([record["threads"] for record in records])
        axes[1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(name, fontsize=10)
    figure.savefig(path, dpi=120)


def _fastest_first(record: Record) -> list[tuple[str, dict[str, Any]]]:
    return sorted(record["sides"].items(), key=lambda side: -side[1]["images_per_second"])


def _what(record: Record) -> str:
    return f"batch {record['batch']}, {record['cache']} page cache, longest side {record['photo_side']}"


def _case(record: Record) -> str:
    count = record["threads"]
    return f"{count} thread{'s' * (count > 1)} or workers, batch {record['batch']}, {record['cache']} page cache"


def _ratio(record: Record, side: str) -> str:
    peer = record["sides"].get(PEER)
    return f"{record['sides'][side]['images_per_second'] / peer['images_per_second']:.2f}" if peer else ""
