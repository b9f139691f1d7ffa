"""Records of the loader benchmark as tables and as a picture, and their targets."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.loaders.peers.stream import COMPLETE
from benchmarks.render import Record, Table, fastest_first

PEER = "timm"
_OURS = "fastdeit-"
# On an H200 with 16 cores: training samples, of which a third are decoded.
SAMPLES_PER_SECOND = {"fastdeit-dali-x3-gpu": 25_000.0}
_COLOURS = ("#1f6fb4", "#d9822b", "#2f8f4e", "#7a4fa3", "#b03a48", "#7a7a7a", "#5b8c9c", "#a08030")


def targets(record: Record) -> list[dict[str, Any]]:
    """Every target of a record: `text` with the measured value, and whether it was `reached`."""
    results = []
    for name, minimum in SAMPLES_PER_SECOND.items():
        if name in record["sides"]:
            rate = record["sides"][name]["images_per_second"]
            text = f"{name}: {rate:,.0f} samples/s of at least {minimum:,.0f}"
            results.append({"text": text, "reached": rate >= minimum})
    return results


def table(record: Record) -> Table:
    """One row per loader, the fastest first, then those without figures and why."""
    rows = [
        (
            name,
            figures["work"],
            f"{figures['images_per_second']:,.0f}",
            f"{figures['spread']:.0%}",
            _ratio(record, name),
            f"{figures['cpu_ms_per_image']:.2f}",
            f"{figures['peak_memory_mib']:,.0f}",
        )
        for name, figures in fastest_first(record["sides"])
    ]
    rows += [(name, f"missing: {reason}") for name, reason in record["missing"].items()]
    rows += [(name, f"failed: {reason}") for name, reason in record["failed"].items()]
    notes = [f"{name}: {remark}" for name, figures in record["sides"].items() for remark in figures["remarks"]]
    if record["photos_not_reduced"]:
        notes.append(f"{record['photos_not_reduced']} photographs were already small enough and are unchanged")
    return Table(
        title=f"{_describe_case(record)}, {record['images']} JPEGs of {record['mean_bytes'] / 1000:.0f} kB, "
        f"longest side {record['photo_side']}; median of the windows.",
        columns=("loader", "work", "images/s", "spread", f"/ {PEER}", "CPU ms an image", "peak MiB"),
        align="llrrrrr",
        rows=rows,
        notes=notes,
    )


def scaling_table(records: Sequence[Record]) -> Table | None:
    """Rates by thread count for records that differ only in threads; None for fewer than two.

    The gain is the rate that an added core brings, as a share of the first count's rate per core.
    """
    records = sorted(records, key=lambda record: record["threads"])
    if len(records) < 2:
        return None
    counts = [record["threads"] for record in records]
    rows = []
    for name in dict.fromkeys(name for record in reversed(records) for name, _ in fastest_first(record["sides"])):
        rates = [record["sides"].get(name, {}).get("images_per_second") for record in records]
        cells = ["" if rates[0] is None else f"{rates[0]:,.0f}"]
        for (less, more), (before, after) in zip(pairwise(counts), pairwise(rates), strict=True):
            gain = ""
            if rates[0] is not None and before is not None and after is not None:
                gain = f" ({(after - before) / (more - less) / (rates[0] / counts[0]):.2f})"
            cells.append("" if after is None else f"{after:,.0f}{gain}")
        rows.append((name, *cells))
    first = records[0]
    return Table(
        title=f"Images/s by threads and cores, batch {first['batch']}, {first['cache']} page cache, longest side "
        f"{first['photo_side']}; in brackets the gain of each added core, relative to one core.",
        columns=["loader", *(f"{count} thread" + "s" * (count > 1) for count in counts)],
        align="l" + "r" * len(counts),
        rows=rows,
    )


def groups(records: Iterable[Record]) -> list[list[Record]]:
    """Group the records that differ only in the number of threads."""
    grouped: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        key = tuple(record[name] for name in ("batch", "cache", "images", "mean_bytes"))
        grouped.setdefault(key, []).append(record)
    return list(grouped.values())


def plot(machine: str, records: Sequence[Record], path: Path) -> None:
    """Draw bars of every loader at the most threads and, for several thread counts, lines over the threads.

    machine  its name
    records  differ only in the number of threads
    """
    from matplotlib.figure import Figure

    records = sorted(records, key=lambda record: record["threads"])
    last, several = records[-1], len(records) > 1
    names = [name for name, _ in reversed(fastest_first(last["sides"]))]
    figure = Figure(figsize=(13 if several else 8, 1.4 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots(1, 1 + several, squeeze=False)[0]
    rates = [last["sides"][name]["images_per_second"] for name in names]
    low = [rate - min(last["sides"][name]["windows"]) for name, rate in zip(names, rates, strict=True)]
    high = [max(last["sides"][name]["windows"]) - rate for name, rate in zip(names, rates, strict=True)]
    colours = [_COLOURS[0] if name.startswith(_OURS) else "#7a7a7a" for name in names]
    bars = axes[0].barh(names, rates, xerr=(low, high), color=colours, error_kw={"lw": 1, "ecolor": "#222222"})
    for bar, name in zip(bars, names, strict=True):
        if last["sides"][name]["work"] != COMPLETE:
            bar.set(hatch="///", edgecolor="white")
    ends = [rate + more for rate, more in zip(rates, high, strict=True)]
    for row, (rate, end) in enumerate(zip(rates, ends, strict=True)):
        axes[0].text(end + 0.01 * max(ends), row, f"{rate:,.0f}", va="center", fontsize=8)
    axes[0].set(xlabel="images per second (whiskers: all windows; hatched: less work)", title=_describe_case(last))
    axes[0].set_xlim(0, 1.12 * max(ends))
    if several:
        several_counts = [name for name in reversed(names) if sum(name in record["sides"] for record in records) > 1]
        for number, name in enumerate(several_counts):
            points = [
                (record["threads"], record["sides"][name]["images_per_second"])
                for record in records
                if name in record["sides"]
            ]
            style = "o-" if name.startswith(_OURS) else "s--"
            axes[1].plot(*zip(*points, strict=True), style, ms=4, color=_COLOURS[number % len(_COLOURS)], label=name)
        axes[1].set(xlabel="threads and cores", ylabel="images per second", title="Scaling", ylim=(0, None))
        axes[1].set_xticks([record["threads"] for record in records])
        axes[1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(machine, fontsize=10)
    figure.savefig(path, dpi=120)


def _describe_case(record: Record) -> str:
    count = record["threads"]
    return f"{count} thread{'s' * (count > 1)} or workers, batch {record['batch']}, {record['cache']} page cache"


def _ratio(record: Record, name: str) -> str:
    peer = record["sides"].get(PEER)
    return f"{record['sides'][name]['images_per_second'] / peer['images_per_second']:.2f}" if peer else ""
