"""`python -m benchmarks tables`: the results as Markdown, latest record of a configuration on each machine."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.convert import report as convert_report
from benchmarks.kernels import report as kernel_report
from benchmarks.loaders import report as loader_report
from benchmarks.record import RESULTS
from benchmarks.render import Record, Table, require_matplotlib
from benchmarks.throughput import report as throughput_report
from fastdeit.cli import parse, run
from fastdeit.pipelines.errors import UserError, printable
from fastdeit.pipelines.parsing import parse_json

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
    plot_loaders: Path | None = None  # also draw the newest loader records, warm if there are any
    plot_kernels: Path | None = None  # also draw the kernels, of the machine measured last


def read(path: Path) -> list[Record]:
    """The records of a file of JSON lines; none if it does not exist.

    Raises UserError naming the file and the line that is not JSON.
    """
    records: list[Record] = []
    if not path.exists():
        return records
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = _printable(parse_json(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}): remove it") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number} is not a record: remove it")
        if record.get("pass") == "finish":  # the name in older records
            record["pass"] = "normalize_erase_mix"
        records.append(record)
    return records


def _printable(value: Any) -> Any:
    """`value` with its texts as a terminal, Markdown and a plot can show them, each on one line."""
    if isinstance(value, dict):
        return {printable(name): _printable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_printable(inner) for inner in value]
    return printable(value) if isinstance(value, str) else value


def machine(record: Record) -> str:
    """The hardware that produced a record."""
    environment = record["environment"]
    if _on_gpu(record):
        return environment["gpu"]["name"]
    return f"{environment['cpu']}, {environment['cores']} cores"


def _on_gpu(record: Record) -> bool:
    kernels = record["benchmark"] == "kernels" and record["environment"]["gpu"] is not None
    return kernels or record.get("device") == "cuda"


def latest(records: Iterable[Record]) -> dict[str, list[Record]]:
    """By machine, the newest record of every configuration; models in order of size and form."""
    newest: dict[tuple[Any, ...], Record] = {}
    for record in records:
        key = (machine(record), *(record.get(name) for name in CONFIGURATION[record["benchmark"]]))
        if key not in newest or record["environment"]["date"] >= newest[key]["environment"]["date"]:
            newest[key] = record
    machines: dict[str, list[Record]] = {}
    for record in sorted(newest.values(), key=_sort_key):
        machines.setdefault(machine(record), []).append(record)
    return machines


def _sort_key(record: Record) -> tuple[Any, ...]:
    if record["benchmark"] == "soak":
        return record["loader"], -record["minutes"]
    if record["benchmark"] == "convert":
        return -record["workers"], -record["images"]
    if record["benchmark"] == "kernels":
        return kernel_report.sort_key(record)
    if record["benchmark"] == "loaders":
        return record["cache"] == "cold", -record["photo_side"], record["batch"], record["threads"]
    sizes = ("tiny", "small", "base")
    size = next(i for i, name in enumerate(sizes) if name in record["model"])
    return "distilled" in record["model"], size, record["img_size"], record["mode"], record["batch"]


def markdown(records: Iterable[Record]) -> str:
    """A heading and tables for every benchmark and machine. Raises UserError if there is no record."""
    records = list(records)
    sections: dict[str, tuple[str, Callable[[Sequence[Record]], list[str]]]] = {
        "throughput": ("Throughput", lambda rows: [throughput_report.table(rows).markdown(), _bullets(_sources(rows))]),
        "kernels": ("Kernels", _kernels),
        "loaders": ("Loaders", _loaders),
        "convert": ("Conversion", _conversions),
        "soak": ("Soak", lambda rows: [_soak_table(rows).markdown(), _bullets(_sources(rows))]),
    }
    parts = [
        "\n\n".join([f"### {title}, {name}", *render(rows)])
        for benchmark, (title, render) in sections.items()
        for name, rows in latest(r for r in records if r["benchmark"] == benchmark).items()
    ]
    if not parts:
        raise UserError("there are no results yet: run python -m benchmarks throughput, or loaders, first")
    return "\n\n".join(parts)


def _loaders(records: Sequence[Record]) -> list[str]:
    parts = []
    for group in loader_report.groups(records):
        for record in group:
            parts += [loader_report.table(record).markdown(), _bullets(_sources([record]))]
        scaling = loader_report.scaling_table(group)
        parts += [scaling.markdown()] if scaling else []
    return parts


def _kernels(records: Sequence[Record]) -> list[str]:
    tables = [table.markdown() for table in kernel_report.tables(records)]
    return [*tables, _bullets([*kernel_report.notes(records), *_sources(records)])]


def _conversions(records: Sequence[Record]) -> list[str]:
    return [part for r in records for part in (convert_report.table(r).markdown(), _bullets(_sources([r])))]


def _soak_table(records: Sequence[Record]) -> Table:
    rows = []
    for record in records:
        verdict = record["verdict"]
        low, high = verdict["interval"]
        rows.append(
            (
                record["loader"],
                f"{record['minutes']:g}",
                f"{record['batches']:,}",
                f"{record['epochs']:,}",
                f"{record['peak_memory_mib']:,.0f}",
                f"{verdict['slope']:+.2f} ({low:+.2f} to {high:+.2f})",
                f"{verdict['growth']:+.1%}",
                "passed" if record["passed"] else "; ".join(verdict["reasons"]),
            )
        )
    return Table(
        title="Epochs of loading and augmenting, each opening and closing everything; growth after the first third.",
        columns=("loader", "minutes", "batches", "epochs", "peak MiB", "MiB per 1000 batches (95%)", "growth", ""),
        align="lrrrrrrl",
        rows=rows,
    )


def _bullets(notes: Sequence[str]) -> str:
    return "\n".join(f"- {note}" for note in notes)


def _sources(records: Sequence[Record]) -> list[str]:
    """Versions, commits, dates, spread of the windows and commands of the figures, and refused records."""
    versions = dict.fromkeys(
        ", ".join(f"{name} {r['environment']['versions'][name]}" for name in ("torch", "timm", "triton"))
        + (f", driver {r['environment']['gpu']['driver']}" if _on_gpu(r) else "")
        for r in records
    )
    commits = dict.fromkeys(str(r["environment"]["commit"])[:12] for r in records)
    dates = sorted({r["environment"]["date"][:10] for r in records})
    figures = [figures for r in records for figures in r.get("sides", {}).values() if "spread" in figures]
    notes = [f"{'; '.join(versions)}; commit {', '.join(commits)}; {dates[0]}" + f" to {dates[-1]}" * (len(dates) > 1)]
    if figures:
        windows, spread = min(len(each["windows"]) for each in figures), max(each["spread"] for each in figures)
        notes.append(f"At least {windows} windows each; they spread by at most {100 * spread:.0f}%.")
    notes += [f"Command: `{command}`" for command in dict.fromkeys(r["environment"]["command"] for r in records)]
    return notes + [
        f"{r['model']} at {r['img_size']}, {r['mode']}, is not timed: {r['refused']}."
        for r in records
        if r["benchmark"] == "throughput" and "refused" in r
    ]


def _drawable(records: Iterable[Record], benchmark: str, option: str) -> dict[str, list[Record]]:
    """By machine, the records with figures. Raises UserError if there are none, or matplotlib is not installed."""
    require_matplotlib(option)
    machines = latest(r for r in records if r["benchmark"] == benchmark and r.get("sides"))
    if not machines:
        raise UserError(f"{option}: there is no figure to draw yet; run python -m benchmarks {benchmark} first")
    return machines


def plot_throughput(records: Iterable[Record], path: Path) -> None:
    """Draw every model's images per second, one panel per machine; errors as in `_drawable`."""
    throughput_report.plot(_drawable(records, "throughput", "--plot"), path)


def plot_loaders(records: Iterable[Record], path: Path) -> None:
    """Draw the loaders of the newest run and their scaling with threads; errors as in `_drawable`."""
    groups = [
        (max(record["environment"]["date"] for record in group), group[0]["cache"] == "warm", name, group)
        for name, rows in _drawable(records, "loaders", "--plot-loaders").items()
        for group in loader_report.groups(rows)
    ]
    newest = max(date[:10] for date, *_ in groups)
    _, _, name, group = max((row for row in groups if row[0][:10] == newest), key=lambda row: (row[1], row[0]))
    loader_report.plot(name, group, path)


def plot_kernels(records: Iterable[Record], path: Path) -> None:
    """Draw the kernels' share of the roof on the machine measured last; errors as in `_drawable`."""
    machines = _drawable(records, "kernels", "--plot-kernels")
    name = max(machines, key=lambda machine: max(r["environment"]["date"] for r in machines[machine]))
    kernel_report.plot(name, machines[name], path)


def render(options: Options) -> None:
    """Print the tables and draw the plots that the options name."""
    records = [record for name in CONFIGURATION for record in read(options.results / f"{name}.jsonl")]
    print(markdown(records))
    for path, plot in (
        (options.plot, plot_throughput),
        (options.plot_loaders, plot_loaders),
        (options.plot_kernels, plot_kernels),
    ):
        if path is not None:
            plot(records, path)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""

    run(lambda: render(parse(Options, "python -m benchmarks tables", argv)))
