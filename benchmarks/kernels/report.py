"""Records of the kernel benchmark as tables and as a picture, and their targets."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.render import Record, Table

OURS = "fastdeit"
# Targets on an H200 for DeiT-B, the loss and the augmentation.
ATTENTION_OVER_SDPA = 1.2
BANDWIDTH_SHARE = {"assemble_tokens": 0.85, "add_layer_norm": 0.85}
LOSS_OVER = {"eager": 5.0, "compiled": 1.5}
TIMES_FLOOR = {"augment": 3.0}
IMAGES_PER_SECOND = {"augment": 150_000.0, "resize": 100_000.0}
PASSES = ("resize", "operations", "normalize_erase_mix", "augment", "stage", "stage from the host")
_COLOURS = {True: "#1f6fb4", False: "#8a8a8a"}
_LIGHT = {True: "#9cc4e4", False: "#cfcfcf"}


def targets(record: Record) -> list[dict[str, Any]]:
    """Every target of a record: `text` with the measured value, and whether it was `reached`."""
    contenders = record["sides"]
    if OURS not in contenders:
        return []
    ours, results = contenders[OURS], []

    def judge(text: str, value: float, limit: float, unit: str = "x") -> None:
        shown, minimum = (f"{100 * v:.0f}%" if unit == "%" else f"{v:,.2f}x" for v in (value, limit))
        results.append({"text": f"{text}: {shown} of at least {minimum}", "reached": value >= limit})

    if record["op"] == "augment":
        name = record["pass"]
        if name in TIMES_FLOOR:
            text = f"{ours['times_floor']:.2f}x the floor, at most {TIMES_FLOOR[name]:.0f}x"
            results.append({"text": text, "reached": ours["times_floor"] <= TIMES_FLOOR[name]})
        if name in IMAGES_PER_SECOND:
            rate, minimum = ours["images_per_second"], IMAGES_PER_SECOND[name]
            results.append({"text": f"{rate:,.0f} im/s of at least {minimum:,.0f}", "reached": rate >= minimum})
    elif record["op"] == "distillation_loss":
        for name, limit in LOSS_OVER.items():
            if name in contenders:
                ratio = contenders[name]["both"]["ms"] / ours["both"]["ms"]
                judge(f"faster than {name}, launched call by call", ratio, limit)
    elif record["model"] == "base":
        backends = [_best(figures["both"]) for name, figures in contenders.items() if name.startswith("sdpa ")]
        if record["op"] == "attention" and record["tokens"] == 198 and backends:
            judge("faster than the best SDPA backend", min(backends) / _best(ours["both"]), ATTENTION_OVER_SDPA)
        if record["op"] in BANDWIDTH_SHARE:
            for direction, text in (("forward", "of the copy's bandwidth, forward"), ("both", "of it, with backward")):
                judge(text, ours[direction]["share_of_roof"], BANDWIDTH_SHARE[record["op"]], "%")
    return results


def _best(figures: dict[str, Any]) -> float:
    """Milliseconds without launches, if a CUDA graph could be timed."""
    return figures.get("graph_ms", figures["ms"])


def sort_key(record: Record) -> tuple[Any, ...]:
    """Order of records: the model's operations by name and shape, then the passes in their order."""
    if record["op"] == "augment":
        return 1, PASSES.index(record["pass"]) if "pass" in record else -1, record["batch"]
    model, tokens = _weight(record)
    return 0, record["op"], -model, -tokens, record["batch"]


def title(record: Record) -> str:
    """Operation or pass, shape and batch of a record."""
    if record["op"] == "augment":
        return f"augmentation, {record.get('pass', 'check')}, {record['size']} pixels, batch {record['batch']}"
    shape = f" {record['model']} N{record['tokens']}" if "model" in record else ""
    return f"{record['op']}{shape}, batch {record['batch']}"


def record_table(record: Record) -> Table:
    """One record for the terminal: one row per contender, the fastest first."""
    rows: list[Sequence[str]] = []
    for name, figures in _fastest_first(record):
        if record["op"] == "augment":
            floor = f"{figures['times_floor']:.2f}" if "times_floor" in figures else ""
            row = (_launched_and_graph(figures), floor, f"{figures['images_per_second']:,.0f}")
        else:
            row = tuple(
                cell
                for f in (figures["forward"], figures["both"])
                for cell in (
                    f"{f['ms']:.3f}",
                    f"{f['graph_ms']:.3f}" if "graph_ms" in f else "-",
                    f"{100 * f['share_of_roof']:.0f}%",
                )
            )
        rows.append((name, *row, _ratio(record, name)))
    figure_columns = ("forward ms", "in graph", "roof", "with backward", "in graph", "roof")
    if record["op"] == "augment":
        figure_columns = ("ms", "x floor", "im/s")
    kinds = ("refused", "failed", "absent")
    return Table(
        title=f"{title(record)}{_floor(record)}",
        columns=("", *figure_columns, "ours is faster"),
        align="l" + "r" * (len(figure_columns) + 1),
        rows=rows,
        notes=[f"{name}: {kind}: {reason}" for kind in kinds for name, reason in record[kind].items()],
    )


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
    return sorted(record["sides"].items(), key=lambda contender: _time(record, contender[0]))


def _ratio(record: Record, name: str) -> str:
    """How many times as fast ours is."""
    if name == OURS or OURS not in record["sides"]:
        return ""
    return f"{_time(record, name) / _time(record, OURS):.2f}"


def tables(records: Sequence[Record]) -> list[Table]:
    """One table per operation of the model, and one for the augmentation."""
    model = [record for record in records if record["op"] != "augment"]
    passes = [record for record in records if record["op"] == "augment"]
    made = []
    for op in dict.fromkeys(record["op"] for record in model):
        # The first table explains the figures of all.
        made.append(_model_table("" if made else _EXPLANATION, op, [r for r in model if r["op"] == op]))
    if passes:
        made.append(_pass_table(passes))
    return made


def notes(records: Sequence[Record]) -> list[str]:
    """Roof, targets, and contenders without figures."""
    roof = records[-1]["roof"]
    lines = [f"roof: {roof['bytes_per_second'] / 1e12:.2f} TB/s copied, {roof['flops_per_second'] / 1e12:.0f} TFLOP/s"]
    lines += [
        f"{title(record)}: target {'reached' if target['reached'] else 'missed'}: {target['text']}"
        for record in records
        for target in targets(record)
    ]
    faults: dict[str, list[str]] = {}
    for record in records:
        if record["op"] != "augment":
            for name, reason in _not_timed(record):
                faults.setdefault(f"{name}: {reason}", []).append(title(record))
    lines += [f"{fault} ({'; '.join(titles)})" for fault, titles in faults.items()]
    absent = {name: reason for record in records for name, reason in record["absent"].items()}
    return lines + [f"{name} is not installed: {reason}" for name, reason in absent.items()]


_EXPLANATION = """\
Milliseconds of a call in bf16, forward / with backward, in a CUDA graph (~: launched, where a call cannot be captured);
median of the windows. In brackets, with backward: the share of the roof, and how many times as fast ours is."""


def _model_table(title: str, op: str, records: Sequence[Record]) -> Table:
    rows = []
    for name in dict.fromkeys(name for record in records for name, _ in _fastest_first(record)):
        cells = []
        for record in records:
            figures = record["sides"].get(name)
            if figures is None:
                cells.append("")
                continue
            forward, both = figures["forward"], figures["both"]
            mark = "" if "graph_ms" in both else "~"
            ratio = f", {_ratio(record, name)}x" if _ratio(record, name) else ""
            cells.append(f"{mark}{_best(forward):.3f} / {_best(both):.3f} ({100 * both['share_of_roof']:.0f}%{ratio})")
        rows.append((name, *cells))
    shapes = [f"{r['model']} N{r['tokens']}" if "model" in r else f"batch {r['batch']}" for r in records]
    return Table(
        title=title,
        columns=(op, *shapes),
        align="l" + "r" * len(records),
        rows=rows,
    )


def _pass_table(records: Sequence[Record]) -> Table:
    rows: list[Sequence[str]] = []
    for record in records:
        name = record.get("pass", "check")
        for contender, figures in _fastest_first(record):
            floor = f"{figures['times_floor']:.2f}" if "times_floor" in figures else ""
            rate = f"{figures['images_per_second']:,.0f}"
            rows.append((name, contender, _launched_and_graph(figures), floor, rate, _ratio(record, contender)))
        rows += [(name, contender, reason) for contender, reason in _not_timed(record)]
    return Table(
        title="Augmentation: each pass, and the time to move its bytes; in a CUDA graph if that could be timed.",
        columns=("pass", "contender", "ms", "x floor", "im/s", "ours is faster"),
        align="llrrrr",
        rows=rows,
    )


def _launched_and_graph(figures: dict[str, Any]) -> str:
    return f"{figures['ms']:.3f}" + (f" ({figures['graph_ms']:.3f} in a graph)" if "graph_ms" in figures else "")


def _not_timed(record: Record) -> list[tuple[str, str]]:
    return [(name, f"{kind}: {reason}") for kind in ("refused", "failed") for name, reason in record[kind].items()]


def plot(machine: str, records: Sequence[Record], path: Path) -> None:
    """Draw each contender's share of the roof, one panel per operation at its largest shape.

    machine  its name
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
        for row, (name, bars) in enumerate(rows):
            ours, thick = name == OURS or text == _OUR_PASSES, 0.84 / len(bars)
            for i, (share, label) in enumerate(bars):
                # The last bar, forward and backward, is the one that counts.
                colour = (_COLOURS if i == len(bars) - 1 else _LIGHT)[ours]
                middle = row - 0.42 + (i + 0.5) * thick
                # Data that stays in the cache between calls can exceed the roof: cut the bar and say so.
                percent = min(100 * share, 105)
                label = label if percent == 100 * share else f"{100 * share:.0f}%, {label}"
                axis.barh(middle, percent, height=0.9 * thick, color=colour, zorder=2)
                axis.text(percent + 1.5, middle, label, va="center", fontsize=7, zorder=3)
        axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
        axis.set_ylim(most[number // across] - 0.5, -0.5)
        axis.set_title(text, fontsize=9, loc="left")
        axis.set_xlim(0, 135)
        axis.set_xticks(range(0, 101, 25), [f"{share}%" for share in range(0, 101, 25)], fontsize=8)
        axis.grid(axis="x", color="#e4e4e4", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{machine}: share of the roof, forward (light), with backward (dark)", fontsize=11)
    figure.savefig(path, dpi=110)


_OUR_PASSES = "augmentation, our passes"
# Label on the left, and bars: share of the roof, and the label behind it.
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
        for name, figures in _fastest_first(record):
            both = (figures["forward"], figures["both"])
            rows.append((name, [(f["share_of_roof"], f"{_best(f):.3f} ms") for f in both]))
        panels.append((title(record), rows + _not_timed_rows(record)))
    ours: list[_Row] = []
    for record in passes:
        rows = []
        for name, figures in _fastest_first(record):
            rows.append((name, [(1 / figures["times_floor"], f"{figures['images_per_second']:,.0f} im/s")]))
            if name == OURS:
                ours.append((record["pass"], rows[-1][1]))
        if len(record["sides"]) > 1:
            panels.append((title(record), rows + _not_timed_rows(record)))
    return [*panels, (_OUR_PASSES, ours)] if ours else panels


def _not_timed_rows(record: Record) -> list[_Row]:
    return [(name, [(0.0, why.partition(":")[0])]) for name, why in _not_timed(record)]


def _weight(record: Record) -> tuple[int, int]:
    return ("tiny", "small", "base").index(record.get("model", "base")), -record.get("tokens", 198)
