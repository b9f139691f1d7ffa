"""`python -m benchmarks tables`: the results as Markdown, latest record of a configuration on each machine."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kernels import tables as kernel_tables
from benchmarks.loaders import tables as loader_tables
from benchmarks.record import RESULTS
from benchmarks.throughput.main import ratio
from fastdeit.cli import parse, run
from fastdeit.pipelines.errors import UserError

Record = dict[str, Any]
CONFIGURATION = {
    "throughput": ("model", "img_size", "mode", "precision", "batch", "ema", "device"),
    "soak": ("loader", "repeats", "batch", "threads", "minutes"),
    "convert": ("workers", "images", "mean_bytes"),
    "kernels": ("op", "model", "tokens", "pass", "batch"),
    "loaders": ("cache", "photo_side", "batch", "threads", "images", "mean_bytes"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Render the results."""

    results: Path = RESULTS  # folder with throughput.jsonl, loaders.jsonl and others, any of them
    plot: Path | None = None  # also draw the throughput into this file (.svg, .png); needs matplotlib
    plot_loaders: Path | None = None  # also draw the newest loaders, warm if there are such
    plot_kernels: Path | None = None  # also draw the kernels, of the machine measured last


def read(path: Path) -> list[Record]:
    """The records of a file of JSON lines; none where it does not exist.

    Raises UserError naming the file and the line that is not JSON.
    """
    records: list[Record] = []
    if not path.exists():
        return records
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}): remove it") from error
    return records


def machine(record: Record) -> str:
    """What a figure was measured on."""
    found = record["environment"]
    if _on_gpu(record):
        return found["gpu"]["name"]
    return f"{found['cpu']}, {found['cores']} cores"


def _on_gpu(record: Record) -> bool:
    kernels = record["benchmark"] == "kernels" and record["environment"]["gpu"] is not None
    return kernels or record.get("device") == "cuda"


def latest(records: Iterable[Record]) -> dict[str, list[Record]]:
    """By machine, the newest record of every configuration; of models, in the order of size and form."""
    newest: dict[tuple[Any, ...], Record] = {}
    for record in records:
        key = (machine(record), *(record.get(name) for name in CONFIGURATION[record["benchmark"]]))
        if key not in newest or record["environment"]["date"] >= newest[key]["environment"]["date"]:
            newest[key] = record
    machines: dict[str, list[Record]] = {}
    for record in sorted(newest.values(), key=_place):
        machines.setdefault(machine(record), []).append(record)
    return machines


def _place(record: Record) -> tuple[Any, ...]:
    if record["benchmark"] == "soak":
        return record["loader"], -record["minutes"]
    if record["benchmark"] == "convert":
        return -record["workers"], -record["images"]
    if record["benchmark"] == "kernels":
        return kernel_tables.place(record)
    if record["benchmark"] == "loaders":
        return record["cache"] == "cold", -record["photo_side"], record["batch"], record["threads"]
    sizes = ("tiny", "small", "base")
    size = next(i for i, name in enumerate(sizes) if name in record["model"])
    return "distilled" in record["model"], size, record["img_size"], record["mode"], record["batch"]


def markdown(records: Iterable[Record]) -> str:
    """A heading and a table for every benchmark and machine. Raises UserError where there is no record."""
    records = list(records)
    renderers = {
        "throughput": _section,
        "kernels": _kernels_section,
        "loaders": _loaders_section,
        "convert": _convert_section,
        "soak": _soak_section,
    }
    sections = [
        section(name, rows)
        for benchmark, section in renderers.items()
        for name, rows in latest(r for r in records if r["benchmark"] == benchmark).items()
    ]
    if not sections:
        raise UserError("there are no results yet: run python -m benchmarks throughput, or loaders, first")
    return "\n\n".join(sections)


def _loaders_section(name: str, records: Sequence[Record]) -> str:
    lines = [f"### Loaders, {name}", ""]
    for group in loader_tables.groups(records):
        for record in group:
            lines += [*loader_tables.table(record), *_footnotes([record]), ""]
        if more := loader_tables.scaling(group):
            lines += [*more, ""]
    return "\n".join(lines).rstrip()


def _kernels_section(name: str, records: Sequence[Record]) -> str:
    return "\n".join([f"### Kernels, {name}", "", *kernel_tables.markdown(records), *_footnotes(records)])


def _convert_section(name: str, records: Sequence[Record]) -> str:
    lines = [f"### Conversion, {name}", ""]
    for record in records:
        lines += [
            f"{record['images']:,} JPEGs of {record['mean_bytes'] / 1000:.0f} kB, {record['workers']} "
            f"process{'es' * (record['workers'] > 1)}, until all is on disk; median of the windows.",
            "",
            "| converter | work | images/s | spread | MB |",
            "|---|---|---:|---:|---:|",
        ]
        for side, figures in sorted(record["sides"].items(), key=lambda item: -item[1]["images_per_second"]):
            rate, size = f"{figures['images_per_second']:,.0f}", f"{figures['megabytes']:,.0f}"
            lines.append(f"| {side} | {figures['work']} | {rate} | {figures['spread']:.0%} | {size} |")
        reasons = {**record["missing"], **record["failed"]}
        lines += [*(f"| {side} | {reason} | | | |" for side, reason in reasons.items()), "", *_footnotes([record]), ""]
    return "\n".join(lines).rstrip()


def _soak_section(name: str, records: Sequence[Record]) -> str:
    lines = [
        f"### Soak, {name}",
        "",
        "Epochs of loading and augmenting, everything opened and closed at each; what grows after the first third.",
        "",
        "| loader | minutes | batches | epochs | peak MiB | MiB per 1000 batches (95%) | growth | |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for record in records:
        found = record["verdict"]
        low, high = found["interval"]
        lines.append(
            f"| {record['loader']} | {record['minutes']:g} | {record['batches']:,} | {record['epochs']:,} "
            f"| {record['peak_memory_mib']:,.0f} | {found['slope']:+.2f} ({low:+.2f} to {high:+.2f}) "
            f"| {found['growth']:+.1%} | {'passed' if record['passed'] else '; '.join(found['reasons'])} |"
        )
    return "\n".join([*lines, "", *_footnotes(records)])


def _section(name: str, records: Sequence[Record]) -> str:
    sides = _sides(records)
    head = ["model", "size", "mode", "precision", "batch", *sides, "fastdeit / timm"]
    lines = [
        f"### Throughput, {name}",
        "",
        "Images per second, median of the windows; the ratio is that of the fastest form of each.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * 5}{'---:|' * (len(sides) + 1)}",
    ]
    for record in records:
        mode = record["mode"] + (" + EMA" if record["ema"] else "")
        cells = [record["model"], str(record["img_size"]), mode, record["precision"], str(record["batch"])]
        cells += [_cell(record, side) for side in sides]
        best = ratio(record)
        cells.append("not timed" if "refused" in record else f"{best:.2f}" if best is not None else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_footnotes(records)])


def _sides(records: Sequence[Record]) -> list[str]:
    """Every side that a record has: timm's before ours, eager before compiled."""
    sides = {side for record in records for side in record.get("sides", {})}
    return sorted(sides, key=lambda side: (side.startswith("fastdeit"), side.count(" + "), "compiled" in side))


def _cell(record: Record, side: str) -> str:
    if side in record.get("failed", {}):
        return record["failed"][side]
    figures = record.get("sides", {}).get(side)
    if figures is None:
        return ""
    rate = f"{figures['images_per_second']:,.{0 if figures['images_per_second'] >= 100 else 1}f}"
    memory = figures["peak_memory_mib"]
    return rate if memory is None else f"{rate} ({memory / 1024:.1f} GiB)"


def _footnotes(records: Sequence[Record]) -> list[str]:
    """Where the figures come from: versions, commits, commands, the spread of the windows; what was refused."""
    versions = dict.fromkeys(
        ", ".join(f"{name} {r['environment']['versions'][name]}" for name in ("torch", "timm", "triton"))
        + (f", driver {r['environment']['gpu']['driver']}" if _on_gpu(r) else "")
        for r in records
    )
    commits = dict.fromkeys(str(r["environment"]["commit"])[:12] for r in records)
    dates = sorted({r["environment"]["date"][:10] for r in records})
    sides = [side for r in records for side in r.get("sides", {}).values() if "spread" in side]
    spreads, windows = [side["spread"] for side in sides], [len(side["windows"]) for side in sides]
    notes = [f"{'; '.join(versions)}; commit {', '.join(commits)}; {dates[0]}" + f" to {dates[-1]}" * (len(dates) > 1)]
    if spreads:
        notes.append(f"At least {min(windows)} windows a side; they spread by at most {100 * max(spreads):.0f}%.")
    notes += [f"Command: `{command}`" for command in dict.fromkeys(r["environment"]["command"] for r in records)]
    notes += [
        f"{r['model']} at {r['img_size']}, {r['mode']}, is not timed: {r['refused']}."
        for r in records
        if r["benchmark"] == "throughput" and "refused" in r
    ]
    return [f"- {note}" for note in notes]


def plot(records: Iterable[Record], path: Path) -> None:
    """Bars of a model's images per second, one panel a machine.

    Raises UserError where matplotlib is not installed or nothing was measured.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'fastdeit[demo]'") from error
    machines = latest(r for r in records if r["benchmark"] == "throughput" and r.get("sides"))
    if not machines:
        raise UserError("--plot: there is no figure to draw yet; run python -m benchmarks throughput first")
    most = max(len(rows) for rows in machines.values())
    figure, axes = plt.subplots(1, len(machines), figsize=(7 * len(machines), 1.5 + 0.9 * most), squeeze=False)
    for axis, (name, rows) in zip(axes[0], machines.items(), strict=True):
        sides = _sides(rows)
        height = 0.8 / len(sides)
        for i, side in enumerate(sides):
            places = [(row + i * height, record) for row, record in enumerate(rows) if side in record["sides"]]
            rates = [record["sides"][side]["images_per_second"] for _, record in places]
            bars = axis.barh([place for place, _ in places], rates, height=height, label=side)
            axis.bar_label(bars, fmt="{:,.4g}", padding=3, fontsize=8)
        labels = [f"{r['model']}\n{r['img_size']}, {r['mode']}, {r['precision']}" for r in rows]
        axis.set_yticks([row + 0.4 - height / 2 for row in range(len(rows))], labels, fontsize=8)
        axis.invert_yaxis()
        axis.set(title=name, xlabel="images per second")
        axis.margins(x=0.15)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def plot_loaders(records: Iterable[Record], path: Path) -> None:
    """Bars of the loaders of the newest run, and lines over its thread counts.

    Raises UserError where matplotlib is not installed or no loader was measured.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot-loaders needs matplotlib: pip install 'fastdeit[demo]'")
    found = latest(r for r in records if r["benchmark"] == "loaders" and r["sides"])
    dated = [
        (max(record["environment"]["date"] for record in group), group[0]["cache"] == "warm", name, group)
        for name, rows in found.items()
        for group in loader_tables.groups(rows)
    ]
    if not dated:
        raise UserError("--plot-loaders: there is no figure to draw yet; run python -m benchmarks loaders first")
    newest = max(date[:10] for date, *_ in dated)
    _, _, name, group = max((row for row in dated if row[0][:10] == newest), key=lambda row: (row[1], row[0]))
    loader_tables.plot(name, group, path)


def plot_kernels(records: Iterable[Record], path: Path) -> None:
    """Bars of the share of the roof that the kernels reach on the machine that was measured last.

    Raises UserError where matplotlib is not installed or no kernel was measured.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot-kernels needs matplotlib: pip install 'fastdeit[demo]'")
    found = latest(r for r in records if r["benchmark"] == "kernels" and r["sides"])
    if not found:
        raise UserError("--plot-kernels: there is no figure to draw yet; run python -m benchmarks kernels first")
    name = max(found, key=lambda machine: max(r["environment"]["date"] for r in found[machine]))
    kernel_tables.plot(name, found[name], path)


def tables(options: Options) -> None:
    """Print the tables; draw the plot."""
    records = [record for name in CONFIGURATION for record in read(options.results / f"{name}.jsonl")]
    print(markdown(records))
    if options.plot is not None:
        plot(records, options.plot)
    if options.plot_loaders is not None:
        plot_loaders(records, options.plot_loaders)
    if options.plot_kernels is not None:
        plot_kernels(records, options.plot_kernels)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""

    run(lambda: tables(parse(Options, "python -m benchmarks tables", argv)))
