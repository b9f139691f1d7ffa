"""Logs of runs that nobody trained, and what a page of `fastdeit report` holds."""

import json
import math
from contextlib import closing
from html.parser import HTMLParser

from fastdeit.recipes import deit_tiny_distilled
from fastdeit.training.logs import RunLog

BEGAN = 1_700_000_000.0
VOID = {"meta", "img", "br", "link"}


def open_log(folder, **options):
    return RunLog(folder, **{"active": True, "tensorboard": False, "progress": False, **options})


def run_log(folder, **options):
    """The same, which `with` closes."""
    return closing(open_log(folder, **options))


def start(time=BEGAN, world=1, recipe=None, **fields):
    recipe = (recipe or deit_tiny_distilled()).filled().to_dict()
    return {
        "event": "start", "time": time, "run": "0123abcd", "recipe": recipe, "world": world,
        "device": "cpu", "steps_per_epoch": 10, "forecast_seconds": None, **fields,
    }  # fmt: skip


def train(step, time=None, **fields):
    return {
        "event": "train", "time": BEGAN + step if time is None else time, "epoch": step // 10, "step": step % 10,
        "global_step": step, "loss": 3 / step, "loss_base": 2 / step, "loss_distill": 1 / step, "lr": 1e-3,
        "images_per_second": 100.0 + step, "data_wait": 0.25, **fields,
    }  # fmt: skip


def evaluation(epoch, top1, weights="ema", **fields):
    head = {"top1": top1, "top5": 90.0, "loss": 1.0}
    return {
        "event": "eval", "time": BEGAN + 10 * epoch + 10, "epoch": epoch, "global_step": 10 * epoch + 10,
        "weights": weights, "images": 44, "class": head, "distillation": head, "fused_probabilities": head, **fields,
    }  # fmt: skip


def write_run(folder, *events, tail=""):
    """A run's folder with a log of these events; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + tail)
    return folder


class Page(HTMLParser):
    """A page as a browser reads it.

    text     of everything but scripts and styles
    scripts  the contents of script elements
    figures  data and layout of each figure, by its id
    tags     (name, attributes) of every element
    faults   elements that do not close
    """

    def __init__(self, markup):
        super().__init__()
        self.text, self.scripts, self.tags, self.faults, self._open = "", [], [], [], []
        self.feed(markup)
        self.close()
        self.faults += self._open
        (held,) = [at for at, (name, attributes) in enumerate(self.of("script")) if attributes.get("id") == "figures"]
        self.figures = json.loads(self.scripts[held])

    def of(self, name):
        return [tag for tag in self.tags if tag[0] == name]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"/{tag}")

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        elif not self._open or self._open[-1] != "style":
            self.text += data

    def points(self, figure, name):
        """The (x, y) of a curve; not drawn where the value is not finite."""
        (trace,) = [each for each in self.figures[f"figure-{figure}"]["data"] if each["name"] == name]
        return list(zip(trace["x"], trace["y"], strict=True))


def close_to(points, expected):
    """Whether a page's points are these, in seven digits."""
    return len(points) == len(expected) and all(
        x == x2 and (y2 is None or math.isclose(y, y2, rel_tol=1e-6)) and (y is None) == (y2 is None)
        for (x, y), (x2, y2) in zip(points, expected, strict=True)
    )
