"""The figures of a page, as data for plotly.js. Texts are escaped, and long curves are thinned."""

from __future__ import annotations

import html
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastdeit.pipelines.errors import UserError, printable
from fastdeit.recipes.curves import curve, whose
from fastdeit.report.runs import Run, published, trains_a_recipe_on_its_data

Figure = dict[str, Any]  # `data` and `layout` of plotly.js

MOST_POINTS = 2000  # in a curve
# One for each run; all are legible on white and on black.
COLOURS = ("#3d85d0", "#d9822b", "#3a9d5d", "#c2528b", "#8a7bd1", "#b59a1f", "#2fa3a3", "#c8574a", "#7d8b99", "#9c6b4f")
_MARKS = {"resume": ("#3a9d5d", "dot"), "rewind": ("#c8574a", "dash"), "stopped": ("#7d8b99", "dashdot")}
_LONGEST = 20  # characters of a class's name on an axis
_FEW_EPOCHS, _FEW_MARKERS = 12, 60  # up to so many, each epoch has a tick, and each evaluation a marker
_FEW_CLASSES = 12  # up to so many, a matrix has counts in its cells and names below its columns


def plotly_script() -> str:
    """The source of plotly.js. Raises UserError if plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError("a report needs plotly: pip install 'fastdeit[report]'") from error
    return get_plotlyjs()


def label(text: str) -> str:
    """`text` for plotly.js, which would read `<b>` as bold and `<a>` as a link."""
    return html.escape(printable(text), quote=False)


def as_json(value: Any) -> str:
    """JSON for a script element: `<` is escaped, so no text can end the element; NaN and infinity become null."""

    def plain(each: Any) -> Any:
        if isinstance(each, dict):
            return {key: plain(inner) for key, inner in each.items()}
        if isinstance(each, list | tuple | np.ndarray):
            return [plain(inner) for inner in each]
        if isinstance(each, float | np.floating):
            return float(f"{each:.7g}") if math.isfinite(each) else None
        return int(each) if isinstance(each, np.integer) else each

    text = json.dumps(plain(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """About `most` points of a curve: the lowest and the highest of each of `most` / 2 stretches, and both ends.

    A curve with more points also loses those that are not finite.
    """
    if len(x) <= most:
        return x, y
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= most:
        return x, y
    bounds = np.linspace(0, len(x), most // 2 + 1).astype(int)
    kept = {0, len(x) - 1}
    for start, end in itertools.pairwise(bounds):
        kept |= {start + int(y[start:end].argmin()), start + int(y[start:end].argmax())}
    chosen = sorted(kept)
    return x[chosen], y[chosen]


def _axes(x: str, y: str, **of_y: Any) -> Figure:
    return {
        "xaxis": {"title": {"text": x}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": y, "standoff": 8}, "automargin": True, **of_y},
        "margin": {"l": 58, "r": 12, "t": 8, "b": 44},
        "height": 320,
        "hovermode": "closest",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 11}},
    }


def _line(x: Any, y: Any, name: str, colour: str, dash: str = "solid", **more: Any) -> Figure:
    line = {"color": colour, "dash": dash, "width": 1.6}
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "name": label(name), "line": line, **more}


def curves(runs: Sequence[Run]) -> dict[str, Figure]:
    """Loss, learning rate, throughput and data wait of the runs by step; the keys name the panels."""
    panels = {
        "loss": ("training loss", ("loss", "loss_base", "loss_distill"), {}),
        "rate": ("learning rate", ("lr",), {"exponentformat": "e"}),
        "throughput": ("images per second", ("images_per_second",), {"rangemode": "tozero"}),
        "wait": ("share of time waiting for data", ("data_wait",), {"tickformat": ".0%", "range": [0, 1]}),
    }
    out: dict[str, Figure] = {}
    for name, (title, columns, of_y) in panels.items():
        data = [trace for at, run in enumerate(runs) for trace in _traces(run, columns, at, len(runs))]
        layout = _axes("step", title, **of_y) | {"yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False}}
        out[name] = {"data": data + _marks(runs), "layout": layout}
    return out


def _traces(run: Run, columns: Sequence[str], at: int, of: int) -> list[Figure]:
    """The curves of one run. With several runs, the two parts of the loss stay hidden until clicked in the legend."""
    names = {"loss": "loss", "loss_base": "class token", "loss_distill": "distillation token"}
    out = []
    for number, column in enumerate(columns):
        x, y = thinned(run.columns["global_step"], run.columns[column])
        if number and not np.any(run.columns["loss_distill"] > 0):
            continue
        part = names.get(column, "")
        if of == 1:
            out.append(_line(x, y, part or run.label, COLOURS[number], showlegend=len(columns) > 1))
        else:
            dash = ("solid", "dash", "dot")[number]
            name = f"{run.label}, {part}" if number else run.label
            shown = {"visible": "legendonly"} if number else {}
            out.append(_line(x, y, name, _colour(at), dash, **shown))
    return out


def _marks(runs: Sequence[Run]) -> list[Figure]:
    """Vertical lines where the runs resumed, went back or stopped: one trace for each kind."""
    out = []
    for kind, (colour, dash) in _MARKS.items():
        marks = [(run, mark) for run in runs for mark in run.marks if mark.kind == kind]
        if not marks:
            continue
        x = [value for _, mark in marks for value in (mark.step, mark.step, None)]
        texts = [label(f"{run.label}, step {mark.step}: {mark.text:.200}") for run, mark in marks]
        more = {"yaxis": "y2", "text": [text for each in texts for text in (each, each, "")], "hoverinfo": "text"}
        out.append(_line(x, [0, 1, None] * len(marks), kind, colour, dash, **more))
    return out


def accuracy(runs: Sequence[Run]) -> Figure:
    """Top-1 by epoch for each head and kind of weights, the best score, and the paper's figure if there is one."""
    several = len(runs) > 1
    data = [trace for at, run in enumerate(runs) for trace in _scores(run, _colour(at) if several else None)]
    layout: Figure = _axes("epoch", "validation top-1, %") | {"shapes": [], "annotations": []}
    if all(e.epoch < _FEW_EPOCHS for run in runs for e in run.evaluations):
        layout["xaxis"]["dtick"] = 1
    for name in sorted({str(run.recipe.get("name")) for run in runs if trains_a_recipe_on_its_data(run)}):
        points = curve(name)
        if points:
            x, y = (list(side) for side in zip(*points, strict=True))
            data.append(_line(x, y, f"{name}, {whose(name)}", "#7d8b99", "dot"))
    papers = sorted({paper for run in runs if (paper := published(run)) is not None})
    for number, (top1, source) in enumerate(papers):
        line = {"color": "#7d8b99", "dash": "dash", "width": 1}
        ends = {"xref": "paper", "x0": 0, "x1": 1, "y0": top1, "y1": top1}
        layout["shapes"].append({"type": "line", **ends, "line": line})
        text = {"text": label(f"{top1} ({source})"), "xref": "paper", "x": 0.25 * number, "y": top1}
        layout["annotations"].append({**text, "showarrow": False, "xanchor": "left", "yanchor": "bottom"})
    return {"data": data, "layout": layout}


def _scores(run: Run, colour: str | None) -> list[Figure]:
    """The top-1 curves of a run. With a `colour`, it is one of several runs, and only its headline head is visible."""
    out: list[Figure] = []
    fused = f"fused_{run.recipe.get('departures', {}).get('late_fusion') or 'probabilities'}"
    heads = {"class": "class", "distillation": "distillation", fused: "fused"}
    best, before = run.best or {}, f"{run.label}, " if colour else ""
    headline = best.get("head") or (fused if any(fused in each.scores for each in run.evaluations) else "class")
    for weights, dash, ending in (("model", "solid", ""), ("ema", "dot", " (EMA)")):
        for number, (head, name) in enumerate(heads.items()):
            found = [e for e in run.evaluations if e.weights == weights and head in e.scores]
            x, y = [e.epoch + 1 for e in found], [e.scores[head]["top1"] for e in found]
            hidden = {"visible": "legendonly"} if colour and head != headline else {}
            mode = "lines+markers" if len(found) <= _FEW_MARKERS else "lines"
            more = {"mode": mode, "marker": {"size": 5, "symbol": number}, **hidden}
            if found:
                out.append(_line(x, y, f"{before}{name}{ending}", colour or COLOURS[number], dash, **more))
    for e in run.evaluations:
        if best and (e.step, e.weights) == (best["global_step"], best["weights"]) and best["head"] in e.scores:
            marker = {"symbol": "star", "size": 13, "color": colour or "#c8574a"}
            point = {"type": "scatter", "mode": "markers", "x": [e.epoch + 1], "y": [e.scores[best["head"]]["top1"]]}
            out.append({**point, "marker": marker, "name": label(f"{before}best")})
    return out


def _colour(at: int) -> str:
    """The colour of run number `at`."""
    return COLOURS[at % len(COLOURS)]


def cosines(values: Sequence[float]) -> Figure:
    """The cosine of the two tokens by layer, with the paper's values for the input and the last layer."""
    layers = list(range(len(values)))
    measured = _line(layers, list(values), "this checkpoint", COLOURS[0], mode="lines+markers")
    marker = {"symbol": "x", "size": 9, "color": COLOURS[1]}
    paper = {"type": "scatter", "mode": "markers", "x": [0, layers[-1]], "y": [0.06, 0.93], "marker": marker}
    layout = _axes("block (0: input)", "cosine of class and distillation token")
    return {"data": [measured, {**paper, "name": "paper, DeiT-B on ImageNet"}], "layout": layout}


def confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """The confusion matrix (K, K): rows are true classes, columns predicted classes, in the same order."""
    numbers = list(range(len(names)))
    short = [label(name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…") for name in names]
    hover = [
        [f"{true}, predicted as {short[column]}: {int(counts[row, column])}" for column in numbers]
        for row, true in enumerate(short)
    ]
    grey = [[0, "rgba(128,128,128,0.08)"], [1e-9, "rgba(61,133,208,0.2)"], [1, "rgb(61,133,208)"]]
    data = {"type": "heatmap", "z": counts, "hovertext": hover, "hoverinfo": "text", "colorscale": grey, "zmin": 0}
    if len(names) <= _FEW_CLASSES:
        data |= {"text": [[str(count or "") for count in row] for row in counts.tolist()], "texttemplate": "%{text}"}
    axis = {"tickvals": numbers, "ticktext": short, "automargin": True, "rangemode": "normal", "showgrid": False}
    axis["zeroline"] = False
    layout = _axes("predicted class", "true class")
    layout["xaxis"] |= axis | {"showticklabels": len(names) <= _FEW_CLASSES}
    layout["yaxis"] |= axis | {"autorange": "reversed"}
    layout["height"] = 220 + 22 * min(len(names), 30)
    return {"data": [data | {"xgap": 1, "ygap": 1, "showscale": False}], "layout": layout}
