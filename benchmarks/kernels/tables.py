"""The records of the kernel benchmark as text, as Markdown and as a picture; and what was aimed at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
OURS = "fastdeit"
# On an H200: what is aimed at of DeiT-B, of the loss and of the augmentation.
ATTENTION_OVER_SDPA = 1.2
BANDWIDTH_SHARE = {"assemble_tokens": 0.85, "add_layer_norm": 0.85}
LOSS_OVER = {"eager": 5.0, "compiled": 1.5}
TIMES_FLOOR = {"augment": 3.0}
IMAGES_PER_SECOND = {"augment": 150_000.0, "resize": 100_000.0}
_COLOURS = {True: "#1f6fb4", False: "#8a8a8a"}
_LIGHT = {True: "#9cc4e4", False: "#cfcfcf"}


def verdicts(record: Record) -> list[dict[str, Any]]:
    """What was aimed at with this record: `text` with what was measured, and whether it was `reached`."""
    sides = record["sides"]
    if OURS not in sides:
        return []
    ours, found = sides[OURS], []

    def judge(text: str, value: float, limit: float, unit: str = "x") -> None:
        shown, wanted = (f"{100 * v:.0f}%" if unit == "%" else f"{v:,.2f}x" for v in (value, limit))
        found.append({"text": f"{text}: {shown} of at least {wanted}", "reached": value >= limit})

    if record["op"] == "augment":
        name = record["pass"]
        if name in TIMES_FLOOR:
            text = f"{ours['times_floor']:.2f}x the floor, at most {TIMES_FLOOR[name]:.0f}x"
            found.append({"text": text, "reached": ours["times_floor"] <= TIMES_FLOOR[name]})
        if name in IMAGES_PER_SECOND:
            rate, wanted = ours["images_per_second"], IMAGES_PER_SECOND[name]
            found.append({"text": f"{rate:,.0f} im/s of at least {wanted:,.0f}", "reached": rate >= wanted})
    elif record["op"] == "distillation_loss":
        for name, limit in LOSS_OVER.items():
            if name in sides:
                judge(
                    f"faster than {name}, launched call by call", sides[name]["both"]["ms"] / ours["both"]["ms"], limit
                )
    elif record["model"] == "base":
        backends = [_best(figures["both"]) for name, figures in sides.items() if name.startswith("sdpa ")]
        if record["op"] == "attention" and record["tokens"] == 198 and backends:
            judge("faster than the best SDPA backend", min(backends) / _best(ours["both"]), ATTENTION_OVER_SDPA)
        if record["op"] in BANDWIDTH_SHARE:
            for way, text in (("forward", "of the copy's bandwidth, forward"), ("both", "of it, with backward")):
                judge(text, ours[way]["share_of_roof"], BANDWIDTH_SHARE[record["op"]], "%")
    return found


def _best(figures: dict[str, Any]) -> float:
    """Milliseconds without launches, where they could be left out."""
    return figures.get("graph_ms", figures["ms"])


_PASSES = ("resize", "operations", "finish", "augment", "stage", "stage from the host")


def place(record: Record) -> tuple[Any, ...]:
    """Where a record comes among others: the model's operations by name and shape, the passes in their order."""
    if record["op"] == "augment":
        return 1, _PASSES.index(record["pass"]) if "pass" in record else -1, record["batch"]
    model, tokens = _weight(record)
    return 0, record["op"], -model, -tokens, record["batch"]


def title(record: Record) -> str:
    """What a record is of."""
    if record["op"] == "augment":
        return f"augmentation, {record.get('pass', 'check')}, {record['size']} pixels, batch {record['batch']}"
    shape = f" {record['model']} N{record['tokens']}" if "model" in record else ""
    return f"{record['op']}{shape}, batch {record['batch']}"


def report(record: Record) -> str:
    """A record for the terminal."""
    lines = [f"{title(record)}{_floor(record)}"]
    width = max((len(name) for name in record["sides"]), default=0)
    if record["op"] == "augment":
        for name, figures in _fastest_first(record):
            floor = f"{figures['times_floor']:9.2f}x floor" if "times_floor" in figures else " " * 16
            rate = f"{figures['images_per_second']:11,.0f} im/s"
            time = f"{figures['ms']:10.3f} ms{_in_graph(figures):20}"
            lines.append(f"  {name:{width}}{time}{floor}{rate}{_against(record, name)}")
    elif record["sides"]:
        lines.append(f"  {'':{width}}   forward  in graph       roof   | with bw  in graph       roof")
        for name, figures in _fastest_first(record):
            cells = (
                f"{f['ms']:8.3f} {f.get('graph_ms', float('nan')):8.3f} ms {100 * f['share_of_roof']:6.0f}%"
                for f in (figures["forward"], figures["both"])
            )
            lines.append(f"  {name:{width}}  {'  |'.join(cells)}{_against(record, name)}".replace("nan", "  -"))
    for kind in ("refused", "failed", "absent"):
        lines += [f"  {name}: {kind}: {reason}" for name, reason in record[kind].items()]
    lines += [f"  target {'reached' if v['reached'] else 'MISSED'}: {v['text']}" for v in verdicts(record)]
    return "\n".join(lines)


def _floor(record: Record) -> str:
    floor = record.get("floor_ms")
    if floor is None:
        return ""
    if isinstance(floor, dict):
        return f": floor {floor['forward']:.3f} ms forward, {floor['both']:.3f} ms with backward"
    return f": floor {floor:.3f} ms"


def _time(record: Record, name: str) -> float:
    figures = record["sides"][name]
    return figures["ms"] if record["op"] == "augment" else _best(figures["both"])


def _fastest_first(record: Record) -> list[tuple[str, dict[str, Any]]]:
    return sorted(record["sides"].items(), key=lambda side: _time(record, side[0]))


def _against(record: Record, name: str) -> str:
    if name == OURS or OURS not in record["sides"]:
        return ""
    return f"   ours is {_time(record, name) / _time(record, OURS):.2f}x as fast"


def markdown(records: Sequence[Record]) -> list[str]:
    """Lines of Markdown: a table an operation of the model, one of the augmentation, and the targets."""
    lines: list[str] = []
    model = [r for r in records if r["op"] != "augment"]
    if model:
        lines += [
            "Milliseconds of a call in bf16, forward / with backward, in a CUDA graph (~: launched, since it cannot be",
            "captured); median of the windows. In brackets, of the latter: the share of the roof, and how many times",
            "as fast ours is.",
            "",
        ]
    for op in dict.fromkeys(record["op"] for record in model):
        lines += [*_model_table(op, [record for record in model if record["op"] == op]), ""]
    passes = [r for r in records if r["op"] == "augment"]
    if passes:
        lines += [
            "Augmentation: every pass beside the time that its bytes take, in a CUDA graph where that could be timed.",
            "",
            "| pass | side | ms | x floor | im/s | ours is faster |",
            "|---|---|---:|---:|---:|---:|",
            *(line for record in passes for line in _pass_rows(record)),
            "",
        ]
    roof = records[-1]["roof"]
    notes = [f"roof: {roof['bytes_per_second'] / 1e12:.2f} TB/s copied, {roof['flops_per_second'] / 1e12:.0f} TFLOP/s"]
    notes += [
        f"{title(record)}: target {'reached' if verdict['reached'] else 'missed'}: {verdict['text']}"
        for record in records
        for verdict in verdicts(record)
    ]
    wrong: dict[str, list[str]] = {}
    for record in model:
        for name, why in _not_timed(record):
            wrong.setdefault(f"{name}: {why}", []).append(title(record))
    notes += [f"{why} ({'; '.join(titles)})" for why, titles in wrong.items()]
    absent = {name: reason for record in records for name, reason in record["absent"].items()}
    notes += [f"{name} was not there: {reason}" for name, reason in absent.items()]
    return [*lines, *(f"- {note}" for note in notes)]


def _model_table(op: str, records: Sequence[Record]) -> list[str]:
    heads = [f"{r['model']} N{r['tokens']}" if "model" in r else f"batch {r['batch']}" for r in records]
    lines = [f"| {op} | {' | '.join(heads)} |", f"|---|{'---:|' * len(records)}"]
    for side in dict.fromkeys(side for record in records for side, _ in _fastest_first(record)):
        cells = []
        for record in records:
            figures = record["sides"].get(side)
            if figures is None:
                cells.append("")
                continue
            forward, both = figures["forward"], figures["both"]
            mark = "" if "graph_ms" in both else "~"
            ratio = f", {_ratio(record, side)}x" if _ratio(record, side) else ""
            cells.append(f"{mark}{_best(forward):.3f} / {_best(both):.3f} ({100 * both['share_of_roof']:.0f}%{ratio})")
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return lines


def _pass_rows(record: Record) -> list[str]:
    name = record.get("pass", "check")
    lines = []
    for side, figures in _fastest_first(record):
        floor = f"{figures['times_floor']:.2f}" if "times_floor" in figures else ""
        rate = f"{figures['images_per_second']:,.0f}"
        time = f"{figures['ms']:.3f}{_in_graph(figures)}"
        lines.append(f"| {name} | {side} | {time} | {floor} | {rate} | {_ratio(record, side)} |")
    return lines + [f"| {name} | {side} | {why} | | | |" for side, why in _not_timed(record)]


def _in_graph(figures: dict[str, Any]) -> str:
    return f" ({figures['graph_ms']:.3f} in a graph)" if "graph_ms" in figures else ""


def _ratio(record: Record, name: str) -> str:
    return _against(record, name).removeprefix("   ours is ").removesuffix("x as fast")


def _not_timed(record: Record) -> list[tuple[str, str]]:
    return [(name, f"{kind}: {why}") for kind in ("refused", "failed") for name, why in record[kind].items()]


def plot(name: str, records: Sequence[Record], path: Path) -> None:
    """Bars of the share of the roof that every side reaches, one panel an operation, at its weightiest shape.

    name  of the machine
    """
    from matplotlib.figure import Figure

    panels = sorted(_panels(records), key=lambda panel: -len(panel[1]))
    across = min(3, len(panels))
    most = [len(panels[first][1]) for first in range(0, len(panels), across)]
    figure = Figure(figsize=(5.4 * across, 0.6 + sum(0.75 + 0.36 * rows for rows in most)), layout="constrained")
    axes = figure.subplots(len(most), across, squeeze=False, height_ratios=[1.6 + rows for rows in most])
    for number, axis in enumerate(axes.flatten()):
        if number >= len(panels):
            axis.set_visible(False)
            continue
        text, rows = panels[number]
        for row, (side, bars) in enumerate(rows):
            ours, thick = side == OURS or text == _OUR_PASSES, 0.84 / len(bars)
            for which, (share, label) in enumerate(bars):
                # The last is the one that counts: forward and backward.
                colour = (_COLOURS if which == len(bars) - 1 else _LIGHT)[ours]
                middle = row - 0.42 + (which + 0.5) * thick
                # What stays in the cache between calls has more than the roof: its bar ends early, and says so.
                percent = min(100 * share, 105)
                label = label if percent == 100 * share else f"{100 * share:.0f}%, {label}"
                axis.barh(middle, percent, height=0.9 * thick, color=colour, zorder=2)
                axis.text(percent + 1.5, middle, label, va="center", fontsize=7, zorder=3)
        axis.set_yticks(range(len(rows)), [side for side, _ in rows], fontsize=8)
        axis.set_ylim(most[number // across] - 0.5, -0.5)
        axis.set_title(text, fontsize=9, loc="left")
        axis.set_xlim(0, 135)
        axis.set_xticks(range(0, 101, 25), [f"{share}%" for share in range(0, 101, 25)], fontsize=8)
        axis.grid(axis="x", color="#e4e4e4", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{name}: share of the roof, forward (light), with backward (dark)", fontsize=11)
    figure.savefig(path, dpi=110)


_OUR_PASSES = "augmentation, our passes"
# What is written on the left, and its bars: share of the roof, and what is written behind.
_Row = tuple[str, list[tuple[float, str]]]


def _panels(records: Iterable[Record]) -> list[tuple[str, list[_Row]]]:
    """Title and rows."""
    chosen: dict[str, Record] = {}
    passes = []
    for record in records:
        if record["op"] == "augment":
            passes += [record] if "floor_ms" in record else []
        elif record["op"] not in chosen or _weight(record) > _weight(chosen[record["op"]]):
            chosen[record["op"]] = record
    panels: list[tuple[str, list[_Row]]] = []
    for record in chosen.values():
        rows: list[_Row] = []
        for side, figures in _fastest_first(record):
            both = (figures["forward"], figures["both"])
            rows.append((side, [(f["share_of_roof"], f"{_best(f):.3f} ms") for f in both]))
        panels.append((title(record), rows + _not_timed_rows(record)))
    ours: list[_Row] = []
    for record in passes:
        rows = []
        for side, figures in _fastest_first(record):
            rows.append((side, [(1 / figures["times_floor"], f"{figures['images_per_second']:,.0f} im/s")]))
            if side == OURS:
                ours.append((record["pass"], rows[-1][1]))
        if len(record["sides"]) > 1:
            panels.append((title(record), rows + _not_timed_rows(record)))
    return [*panels, (_OUR_PASSES, ours)] if ours else panels


def _not_timed_rows(record: Record) -> list[_Row]:
    return [(name, [(0.0, why.partition(":")[0])]) for name, why in _not_timed(record)]


def _weight(record: Record) -> tuple[int, int]:
    return ("tiny", "small", "base").index(record.get("model", "base")), -record.get("tokens", 198)
