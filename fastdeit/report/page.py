"""Writes the page of one or more runs: one HTML file that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fastdeit.config import LATER, Recipe
from fastdeit.recipes import RECIPES
from fastdeit.report import figures
from fastdeit.report.elements import Html, Sections, details, element, joined, note, paragraph, table, text
from fastdeit.report.figures import as_json
from fastdeit.report.runs import HEADS, Run, flat, published
from fastdeit.report.style import CSS, SCRIPT
from fastdeit.training.progress import duration

if TYPE_CHECKING:
    from fastdeit.report.network import Findings

# Every page starts with this. The command replaces only files that do.
MARK = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="fastdeit report">"""
_INCIDENTS, _STARTS = 300, 50  # rows of a table
_NONE = "not recorded"


def page(runs: Sequence[Run], findings: Sequence[Findings | None], plotly: str) -> str:
    """The HTML of a report.

    findings  one for each run; None with --no-model
    plotly    the source of plotly.js
    """
    sections, names = Sections(), ", ".join(run.label for run in runs)
    sections.add("overview", "Overview", _overview(runs), *(_starts(run, len(runs) > 1) for run in runs))
    _curves(sections, runs)
    _accuracy(sections, runs)
    sections.add("recipe", "Recipe", *_recipe(runs))
    sections.add("cost", "Cost", *_cost(runs))
    for at, (run, found) in enumerate(zip(runs, findings, strict=True)):
        of, name = (f": {run.label}", f"run{at + 1}-") if len(runs) > 1 else ("", "")
        sections.add(f"{name}incidents", f"Incidents{of}", _incidents(run))
        if found is None:
            sections.add(f"{name}network", f"Network{of}", note("Left out: the report was made with --no-model."))
        else:
            from fastdeit.report.network_sections import add_findings

            add_findings(sections, found, name, of)
    links = joined(element("li", element("a", title, href=f"#{name}")) for name, title in sections.links)
    kind = "Training run" if len(runs) == 1 else f"{len(runs)} training runs"
    body = joined([
        element("a", "Skip to content", href="#overview", class_="skip"),
        element("header", joined([element("h1", f"{kind}: {names}"), element("nav", element("ul", links))])),
        element("main", joined(sections.parts)),
        Html("<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>"),
        Html(f'<script type="application/json" id="figures">{as_json(sections.figures)}</script>'),
    ])  # fmt: skip
    return _document(names, body, [plotly, SCRIPT])


def _document(names: str, body: Html, scripts: Sequence[str]) -> str:
    """The HTML file. Its Content-Security-Policy forbids all requests, and all scripts but these."""
    scripts = [re.sub(r"<(?=/script|!--)", r"<\\", script.replace("\r\n", "\n"), flags=re.I) for script in scripts]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    policy = f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {allowed}"
    return "\n".join([
        MARK,
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(names)} - fastdeit report</title>",
        f"<style>{CSS}</style>",
        "</head>",
        "<body>",
        body,
        *(f"<script>{script}</script>" for script in scripts),
        "</body>",
        "</html>",
        "",
    ])  # fmt: skip


def when(time: float) -> str:
    """A time of the log, UTC."""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _overview(runs: Sequence[Run]) -> Html:
    rows = [
        ("status", [_status(run) for run in runs]),
        ("best score", [_best(run) for run in runs]),
        ("steps", [f"{run.steps:,} of {run.all_steps:,}" for run in runs]),
        ("time", [f"{duration(sum(run.seconds))} in {_starts_of(run)}" for run in runs]),
        ("recipe", [run.recipe["name"] for run in runs]),
        ("folder", [run.folder for run in runs]),
        ("run id", [run.record.get("id") or run.starts[-1].get("run") or _NONE for run in runs]),
        ("hardware", [_hardware(run) for run in runs]),
        ("precision", [run.starts[-1].get("precision", _NONE) for run in runs]),
        ("parameters", [f"{n:,}" if isinstance(n := run.starts[-1].get("parameters"), int) else _NONE for run in runs]),
        ("versions", [_versions(run) for run in runs]),
        ("commit", [_commit(run) for run in runs]),
        ("command", [element("code", run.last_start.get("command", _NONE)) for run in runs]),
    ]
    head = ["", *(run.label for run in runs)]
    return table(head, [(name, *cells) for name, cells in rows], "The runs")


def _status(run: Run) -> str:
    last = when(run.ends[-1])
    if run.status == "incomplete":
        return f"incomplete: still running, or killed; last log line {last} UTC"
    return f"{run.status}, {last} UTC"


def _best(run: Run) -> str:
    best = run.best
    if best is None:
        return "none yet" if run.recipe["run"].get("best_metric") != "none" else "not kept (run.best_metric none)"
    weights = "averaged weights (EMA)" if best["weights"] == "ema" else "weights"
    score = f"{best['score']:.4f}" if best["metric"] == "loss" else f"{best['score']:.2f}%"
    return f"{best['metric']} {score}: {_head(best['head'])}, {weights}, step {best['global_step']:,}"


def _head(name: Any) -> str:
    return f"{str(name).replace('_', ' ')} head" if name in HEADS[:2] else str(name).replace("_", " ")


def _starts_of(run: Run) -> str:
    return "one start" if len(run.starts) == 1 else f"{len(run.starts)} starts"


def _hardware(run: Run) -> str:
    processes = run.last_start.get("processes")
    if not isinstance(processes, dict):
        return f"{run.starts[-1]['world']} x {run.starts[-1].get('device', 'unknown device')}"
    out = []
    for host, devices in processes.items():
        named = [str(each) for each in devices] if isinstance(devices, list) else [str(devices)]
        out.append(f"{host}: " + ", ".join(f"{named.count(one)} x {one}" for one in dict.fromkeys(named)))
    return "; ".join(out)


def _versions(run: Run) -> str:
    versions = run.last_start.get("versions")
    if not isinstance(versions, dict):
        versions = {name: run.starts[-1].get(name, _NONE) for name in ("fastdeit", "torch")}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)


def _commit(run: Run) -> str:
    commit = run.last_start.get("commit")
    if commit is None:
        return run.record_fault or "not in a git checkout"
    clean = str(commit).removesuffix("-dirty")
    return clean if clean == commit else f"{clean}, with uncommitted changes"


def _starts(run: Run, named: bool) -> Html:
    head = ["time, UTC", "processes", "lasted"]
    rows = [
        (when(start["time"]), start["world"], duration(seconds))
        for start, seconds in zip(run.starts, run.seconds, strict=True)
    ]
    title = f"Starts of {run.label}" if named else "Starts"
    return details(title, table(head, rows[-_STARTS:], title))


def _curves(sections: Sections, runs: Sequence[Run]) -> None:
    captions = {
        "loss": "Training loss, averaged over all processes and over the steps since the previous log line.",
        "rate": "Learning rate.",
        "throughput": "Images per second, all processes together.",
        "wait": "Share of the time that training spent waiting for data.",
    }
    if not any(run.steps for run in runs):
        sections.add("curves", "Curves", note("The log has no training line yet."))
        return
    drawn = figures.curves(runs)
    plots = [
        sections.plot(name, drawn[name], f"{captions[name]} By step, for {_names(runs)}.", captions[name])
        for name in captions
    ]
    remark = (
        "Vertical lines mark resumes, rewinds and stops. Click a name in the legend to hide or show its curve. A curve "
        f"of more than {figures.MOST_POINTS:,} points shows the lowest and the highest value of each stretch."
    )
    sections.add("curves", "Curves", note(remark), element("div", joined(plots), class_="plots"))


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(run.label for run in runs)


def _accuracy(sections: Sections, runs: Sequence[Run]) -> None:
    if not any(run.evaluations for run in runs):
        sections.add("accuracy", "Accuracy", note("The log has no evaluation."))
        return
    caption = "Top-1 on the validation set. EMA: the average of the weights. A star marks the best score."
    papers = {paper for run in runs if (paper := published(run)) is not None}
    if papers:
        caption += " The dashed line is the paper's figure for this recipe."
    drawn = sections.plot("accuracy", figures.accuracy(runs), f"{caption} Runs: {_names(runs)}.", caption)
    rows = []
    for run in runs:
        last = {each.weights: each for each in run.evaluations if each.step == run.evaluations[-1].step}
        for weights, found in last.items():
            for head, scores in found.scores.items():
                which = "EMA" if weights == "ema" else weights
                first = [run.label] if len(runs) > 1 else []
                name = [*first, _head(head), which]
                error = f"{scores['ece']:.2f}" if "ece" in scores else ""
                rows.append((*name, f"{scores['top1']:.2f}", f"{scores['top5']:.2f}", f"{scores['loss']:.4f}", error))
    head = [*(["run"] if len(runs) > 1 else []), "head", "weights", "top-1 %", "top-5 %", "loss", "ECE %"]
    numbers = range(len(head) - 4, len(head))
    scores = table(head, rows, "Scores of the last evaluation", list(numbers))
    sections.add("accuracy", "Accuracy", drawn, element("h3", "Last evaluation"), scores)


def _recipe(runs: Sequence[Run]) -> list[Html]:
    # Runs of older versions lack fields, whose defaults are what those versions did.
    defaults = flat(Recipe(name="").to_dict())
    later = {field: defaults[field] for field in LATER}
    recipes = [later | flat(run.recipe) for run in runs]
    if len(runs) > 1:
        columns, heads = recipes, [run.label for run in runs]
        same = "The runs have the same recipe."
    else:
        name = str(recipes[0].get("name"))
        if name not in RECIPES:
            return [
                note(f"There is no recipe called {name} to compare with; recipe.json in the folder has all fields.")
            ]
        columns, heads = [flat(RECIPES[name]().filled().to_dict()), recipes[0]], [name, runs[0].label]
        same = f"Every field is as in the recipe {name}."
    fields = sorted({field for column in columns for field in column})
    rows = [
        (element("code", field), *(_value(column, field) for column in columns))
        for field in fields
        if len({_value(column, field) for column in columns}) > 1
    ]
    what = (
        "Fields that differ between the runs." if len(runs) > 1 else f"Fields that differ from the recipe {heads[0]}."
    )
    return [note(what), table(["field", *heads], rows, what)] if rows else [note(same)]


def _value(recipe: dict[str, Any], field: str) -> str:
    return json.dumps(recipe[field], ensure_ascii=False) if field in recipe else _NONE


def _cost(runs: Sequence[Run]) -> list[Html]:
    on_gpu = any("cuda" in str(start.get("device")) for run in runs for start in run.starts)
    hours = "GPU-hours" if on_gpu else "process-hours"
    rows = [
        ("training", [f"{sum(run.seconds):,.0f} s ({duration(sum(run.seconds))})" for run in runs]),
        (hours, [f"{run.process_seconds / 3600:,.2f}" for run in runs]),
        ("GPU energy", [_energy(run) for run in runs]),
        ("forecast", [_forecast(run) for run in runs]),
    ]
    explained = "Times run from each start to its last log line; they include evaluations and checkpoints."
    if any(run.joules is not None for run in runs):
        explained += " The energy covers only the GPUs, and only finished epochs."
    return [
        table(["", *(run.label for run in runs)], [(name, *cells) for name, cells in rows], "Cost"),
        note(explained),
    ]


def _energy(run: Run) -> str:
    return "not measured" if run.joules is None else f"{run.joules:,.0f} J ({run.joules / 3.6e6:.2f} kWh)"


def _forecast(run: Run) -> str:
    forecast = next((each for start in run.starts if (each := start.get("forecast_seconds")) is not None), None)
    if forecast is None or not math.isfinite(forecast):
        return "none"
    shown = f"{forecast:,.0f} s ({duration(forecast)})"
    if run.status != "finished" or forecast <= 0:
        return f"{shown}; the run has not finished"
    return f"{shown}; the run took {sum(run.seconds) / forecast:.2f} times that"


def _incidents(run: Run) -> Html:
    if not run.incidents:
        return paragraph("none")
    rows = [(when(each.time), each.place, each.kind, each.text) for each in run.incidents]
    shown = table(["time, UTC", "where", "event", "details"], rows[:_INCIDENTS], f"Incidents of {run.label}")
    more = len(rows) - _INCIDENTS
    return joined([shown, note(f"{more} more are in log.jsonl.")]) if more > 0 else shown
