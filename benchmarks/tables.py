"""`python -m benchmarks tables`: the results as Markdown, latest record of a configuration on each machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.record import RESULTS
from benchmarks.throughput import ratio
from fastdeit.cli import UserError, run

Record = dict[str, Any]
CONFIGURATION = ("model", "img_size", "mode", "precision", "batch", "ema", "device")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Render the throughput results."""

    results: Path = RESULTS / "throughput.jsonl"
    plot: Path | None = None  # also draw them into this file (.svg, .png); needs matplotlib


def read(path: Path) -> list[Record]:
    """The records of a file of JSON lines. Raises UserError naming the file and the line that is not JSON."""
    if not path.exists():
        raise UserError(f"{path}: no results yet; python -m benchmarks throughput writes them")
    records: list[Record] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}): remove it") from error
    return records


def machine(record: Record) -> str:
    """What a figure was measured on."""
    found = record["environment"]
    if record["device"] == "cuda":
        return found["gpu"]["name"]
    return f"{found['cpu']}, {found['cores']} cores"


def latest(records: Iterable[Record]) -> dict[str, list[Record]]:
    """By machine, the newest record of every configuration, in the order of models, sizes and modes."""
    newest: dict[tuple[Any, ...], Record] = {}
    for record in records:
        key = (machine(record), *(record[name] for name in CONFIGURATION))
        if key not in newest or record["environment"]["date"] >= newest[key]["environment"]["date"]:
            newest[key] = record
    order = ("tiny", "small", "base")

    def place(record: Record) -> tuple[Any, ...]:
        size = next((i for i, name in enumerate(order) if name in record["model"]), len(order))
        return "distilled" in record["model"], size, record["img_size"], record["mode"], record["batch"]

    machines: dict[str, list[Record]] = {}
    for record in sorted(newest.values(), key=place):
        machines.setdefault(machine(record), []).append(record)
    return machines


def markdown(records: Iterable[Record]) -> str:
    """A heading and a table for every machine. Raises UserError where there is no record."""
    machines = latest(records)
    if not machines:
        raise UserError("the results are empty: run python -m benchmarks throughput first")
    return "\n\n".join(_section(name, rows) for name, rows in machines.items())


def _section(name: str, records: Sequence[Record]) -> str:
    sides = list(dict.fromkeys(side for record in records for side in record.get("sides", {})))
    sides.sort(key=lambda side: (not side.startswith("timm"), side != f"{side.partition(' ')[0]} eager"))
    head = ["model", "size", "mode", "precision", "batch", *sides, "fastdeit / timm"]
    lines = [
        f"### {name}",
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
        + (f", driver {r['environment']['gpu']['driver']}" if r["device"] == "cuda" else "")
        for r in records
    )
    commits = dict.fromkeys(str(r["environment"]["commit"])[:12] for r in records)
    dates = sorted({r["environment"]["date"][:10] for r in records})
    spreads = [side["spread"] for r in records for side in r.get("sides", {}).values()]
    windows = [len(side["windows"]) for r in records for side in r.get("sides", {}).values()]
    notes = [f"{'; '.join(versions)}; commit {', '.join(commits)}; {dates[0]}" + f" to {dates[-1]}" * (len(dates) > 1)]
    if spreads:
        notes.append(f"At least {min(windows)} windows a side; they spread by at most {100 * max(spreads):.0f}%.")
    notes += [f"Command: `{command}`" for command in dict.fromkeys(r["environment"]["command"] for r in records)]
    notes += [
        f"{r['model']} at {r['img_size']}, {r['mode']}, is not timed: {r['refused']}."
        for r in records
        if "refused" in r
    ]
    return [f"- {note}" for note in notes]


def plot(records: Iterable[Record], path: Path) -> None:
    """Bars of images per second, one panel a machine. Raises UserError where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'fastdeit[demo]'") from error
    machines = {name: [r for r in rows if r.get("sides")] for name, rows in latest(records).items()}
    machines = {name: rows for name, rows in machines.items() if rows}
    if not machines:
        raise UserError("no record has figures to plot: run python -m benchmarks throughput first")
    most = max(len(rows) for rows in machines.values())
    figure, axes = plt.subplots(1, len(machines), figsize=(7 * len(machines), 1.5 + 0.9 * most), squeeze=False)
    for axis, (name, rows) in zip(axes[0], machines.items(), strict=True):
        sides = list(dict.fromkeys(side for record in rows for side in record["sides"]))
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


def tables(options: Options) -> None:
    """Print the tables; draw the plot."""
    records = read(options.results)
    print(markdown(records))
    if options.plot is not None:
        plot(records, options.plot)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = tyro.cli(Options, args=argv, prog="python -m benchmarks tables")
    run(lambda: tables(options))
