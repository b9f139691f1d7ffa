"""Records of the throughput benchmark as tables and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.render import Record, Table


def is_ours(name: str) -> bool:
    """Whether a form is ours and draws stochastic depth as timm does; "skip" drops a fixed number instead."""
    return name.startswith("fastdeit") and "skip" not in name


def ratio(record: Record) -> float | None:
    """Our fastest form without "skip" over timm's fastest form; None if either is missing."""
    best: dict[str, float] = {}
    for name, figures in record.get("sides", {}).items():
        if not (is_ours(name) or name.startswith("timm")):
            continue
        library = name.partition(" ")[0]
        best[library] = max(best.get(library, 0.0), figures["images_per_second"])
    return best["fastdeit"] / best["timm"] if len(best) == 2 else None


def table(records: Sequence[Record]) -> Table:
    """One row per record, one column per form of either model."""
    names = form_names(records)
    rows = []
    for record in records:
        mode = record["mode"] + (" + EMA" if record["ema"] else "")
        row = [record["model"], str(record["img_size"]), mode, record["precision"], str(record["batch"])]
        row += [_cell(record, name) for name in names]
        best = ratio(record)
        rows.append([*row, "not timed" if "refused" in record else f"{best:.2f}" if best is not None else ""])
    return Table(
        title="Images per second, median of the windows; the ratio compares the fastest of each, without skip.",
        columns=["model", "size", "mode", "precision", "batch", *names, "fastdeit / timm"],
        align="l" * 5 + "r" * (len(names) + 1),
        rows=rows,
    )


def record_table(record: Record) -> Table:
    """One record for the terminal: one row per form."""
    title = " ".join(str(record[key]) for key in ("model", "img_size", "mode", "precision", "device"))
    rows, notes = [], []
    for name, figures in record.get("sides", {}).items():
        memory = figures["peak_memory_mib"]
        rate, spread = f"{figures['images_per_second']:.1f}", f"{100 * figures['spread']:.0f}%"
        rows.append((name, rate, spread, "" if memory is None else f"{memory:.0f}"))
    if "refused" in record:
        notes.append(f"not timed: {record['refused']}")
    best = ratio(record)
    if best is not None:
        notes.append(f"fastdeit / timm, the fastest form of each, without skip: {best:.3f}")
    return Table(
        title=f"{title}, batch {record['batch']}",
        columns=("form", "images/s", "spread", "peak MiB"),
        align="lrrr",
        rows=[*rows, *record.get("failed", {}).items()],
        notes=notes,
    )


def form_names(records: Sequence[Record]) -> list[str]:
    """Every form that a record has: timm's before ours, eager before compiled."""
    names = {name for record in records for name in record.get("sides", {})}
    return sorted(names, key=lambda name: (name.startswith("fastdeit"), name.count(" + "), "compiled" in name))


def _cell(record: Record, name: str) -> str:
    if name in record.get("failed", {}):
        return record["failed"][name]
    figures = record.get("sides", {}).get(name)
    if figures is None:
        return ""
    rate = f"{figures['images_per_second']:,.{0 if figures['images_per_second'] >= 100 else 1}f}"
    memory = figures["peak_memory_mib"]
    return rate if memory is None else f"{rate} ({memory / 1024:.1f} GiB)"


def plot(machines: dict[str, list[Record]], path: Path) -> None:
    """Draw bars of each model's images per second, one panel per machine."""
    from matplotlib.figure import Figure

    most = max(len(records) for records in machines.values())
    figure = Figure(figsize=(7 * len(machines), 1.5 + 0.9 * most), layout="tight")
    axes = figure.subplots(1, len(machines), squeeze=False)[0]
    for axis, (machine, records) in zip(axes, machines.items(), strict=True):
        names = form_names(records)
        height = 0.8 / len(names)
        for i, name in enumerate(names):
            bars = [
                (row + i * height, record["sides"][name]["images_per_second"])
                for row, record in enumerate(records)
                if name in record["sides"]
            ]
            drawn = axis.barh(*zip(*bars, strict=True), height=height, label=name)
            axis.bar_label(drawn, fmt="{:,.4g}", padding=3, fontsize=8)
        labels = [f"{r['model']}\n{r['img_size']}, {r['mode']}, {r['precision']}" for r in records]
        axis.set_yticks([row + 0.4 - height / 2 for row in range(len(records))], labels, fontsize=8)
        axis.invert_yaxis()
        axis.set(title=machine, xlabel="images per second")
        axis.margins(x=0.15)
        axis.legend(fontsize=8)
    figure.savefig(path)
