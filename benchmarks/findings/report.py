"""The table and the picture of what the findings show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.findings.cells import CELLS, CLAIMS, Claim
from benchmarks.render import Record, Table, require_matplotlib
from fastdeit.pipelines.errors import UserError, naming

BEGIN, END = "<!-- findings -->", "<!-- end of findings -->"
SURE = 0.05  # p-value below which a difference counts
FEWEST = 3  # seeds without which nothing is said
PICTURE = Path("images/findings.svg")  # beside the page

Runs = dict[str, dict[int, dict[str, Any]]]  # scores by cell and seed


class Finding(NamedTuple):
    """A claim's paired differences of top-1, in points, over the seeds that both cells have."""

    claim: Claim
    differences: tuple[float, ...]
    p: float  # two-sided, of a paired t-test; 1 for fewer than two seeds

    @property
    def mean(self) -> float:
        return statistics.mean(self.differences)

    @property
    def spread(self) -> float:
        """Half the width of the 95% confidence interval."""
        from scipy.stats import t

        count = len(self.differences)
        if count < FEWEST:
            return math.inf
        return float(t.ppf(0.975, count - 1)) * statistics.stdev(self.differences) / math.sqrt(count)

    @property
    def verdict(self) -> str:
        if len(self.differences) < FEWEST:
            return "too few seeds"
        if self.p < SURE and not self.claim.equal:
            return "holds" if self.mean > 0 else "**the opposite**"
        if self.claim.equal:
            return "**a difference**" if self.p < SURE else "no difference seen"
        return "not shown"


def by_cell(records: Iterable[Record], data: str) -> Runs:
    """The newest record of each cell and seed."""
    runs: Runs = {}
    for record in records:
        if record["data"] == data:
            runs.setdefault(record["cell"], {})[record["seed"]] = record["scores"]
    return runs


def findings(runs: Runs) -> list[Finding]:
    """Each claim whose cells were both trained, with the same seeds compared pair by pair."""
    from scipy.stats import ttest_rel

    out = []
    for claim in CLAIMS:
        cell, control = runs.get(claim.cell, {}), runs.get(claim.control, {})
        seeds = sorted(cell.keys() & control.keys())
        if not seeds:
            continue
        first = [cell[seed][claim.cell_weights][claim.cell_head]["top1"] for seed in seeds]
        second = [control[seed][claim.control_weights][claim.control_head]["top1"] for seed in seeds]
        differences = tuple(a - b for a, b in zip(first, second, strict=True))
        varies = len(seeds) > 1 and len(set(differences)) > 1
        p = float(ttest_rel(first, second).pvalue) if varies else 1.0
        out.append(Finding(claim, differences, p))
    return out


def claims_table(found: Sequence[Finding]) -> str:
    rows = [
        (
            each.claim.text,
            each.claim.source,
            f"{each.mean:+.2f}" + (f" +- {each.spread:.2f}" if math.isfinite(each.spread) else ""),
            str(len(each.differences)),
            ("< 0.001" if each.p < 0.0005 else f"{each.p:.3f}") if len(each.differences) >= FEWEST else "",
            each.verdict,
        )
        for each in found
    ]
    head = ("claim", "source", "difference in top-1, points", "seeds", "p", "here")
    return Table(title="", columns=head, align="llrrrl", rows=rows).markdown()


def cells_table(runs: Runs) -> str:
    def column(seeds: Mapping[int, dict[str, Any]], weights: str, head: str) -> str:
        values = [scores[weights][head]["top1"] for scores in seeds.values() if head in scores.get(weights, {})]
        if not values:
            return ""
        spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}"

    kinds = (
        ("model", "class"),
        ("model", "distillation"),
        ("model", "fused_probabilities"),
        ("ema", "class"),
    )
    rows = [
        (cell, str(len(runs[cell])), *(column(runs[cell], *kind) for kind in kinds)) for cell in CELLS if cell in runs
    ]
    head = ("cell", "seeds", "class head", "distillation head", "both", "average of the weights")
    return Table(title="", columns=head, align="lrrrrr", rows=rows).markdown()


def cosines(runs: Runs) -> str:
    """One sentence: how alike both tokens are, at the input and after the last block."""
    cell = "hard, distillation token"
    pairs = [(s["cosines"][0], s["cosines"][-1]) for s in runs.get(cell, {}).values() if "cosines" in s]
    if not pairs:
        return ""
    first, last = (statistics.mean(side) for side in zip(*pairs, strict=True))
    return (
        f"Mean cosine of class and distillation token ({cell}): {first:.2f} at the input, {last:.2f} after the last "
        f"block. The paper has 0.06 and 0.93 for DeiT on ImageNet (section 4)."
    )


def write(records: Sequence[Record], page: Path) -> None:
    """Replace the part of `page` between the markers, and draw the picture beside it.

    Raises UserError if the page lacks the markers or there are no records.
    """
    with naming(page):
        text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{page} lacks the lines {BEGIN} and {END}, between which the findings go")
    parts, drawn = [], {}
    for data in ("digits", "fashion-mnist"):
        runs = by_cell(records, data)
        if not runs:
            continue
        found = findings(runs)
        drawn[data] = found
        parts += [f"### {data}", claims_table(found), cells_table(runs), cosines(runs)]
    if not parts:
        raise UserError("there are no results yet: train without --only-report first")
    body = "\n\n".join(part for part in parts if part)
    with naming(page):
        page.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")
    draw(drawn, page.parent / PICTURE)


def draw(found: Mapping[str, Sequence[Finding]], path: Path) -> None:
    """The differences and their 95% confidence intervals, as an SVG."""
    require_matplotlib("--report")
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "findings"
    claims = [claim for claim in CLAIMS if any(claim == each.claim for chosen in found.values() for each in chosen)]
    row = {claim.text: len(claims) - 1 - place for place, claim in enumerate(claims)}  # the first one is on top
    figure = Figure(figsize=(9 if len(found) > 1 else 7, 0.32 * len(row) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for panel, (data, chosen) in zip(panels, found.items(), strict=True):
        for each in chosen:
            sure = each.p < SURE and len(each.differences) >= FEWEST
            holds = each.mean > 0 and not each.claim.equal
            colour = "#8a8a8a" if not sure else "#2f8f4e" if holds else "#b5432f"
            spread = each.spread if math.isfinite(each.spread) else 0.0
            panel.errorbar(each.mean, row[each.claim.text], xerr=spread, fmt="o", color=colour, ms=4, capsize=2)
        panel.axvline(0, color="#444444", lw=0.8)
        panel.set_yticks(list(row.values()), list(row))
        panel.set(title=data, xlabel="difference in top-1, points")
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        figure.savefig(path, metadata={"Date": None})
