"""The sections of a page that show a run's samples and its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from fastdeit.report import figures
from fastdeit.report.elements import Html, Sections, element, joined, note, pictures, table
from fastdeit.report.network import MOST_CLASSES, Findings, Judged
from fastdeit.report.pictures import Missing

_PAIRS = 20


def add_findings(sections: Sections, found: Findings, name: str, of: str) -> None:
    """Add what was found to a page; `name` starts the ids of its sections, `of` ends their titles."""
    if isinstance(found.samples, Missing):
        sections.add(f"{name}samples", f"Training samples{of}", _missing(found.samples))
    else:
        said = "The first samples of the run's first step, as the network saw them: classes and augmentation."
        sections.add(f"{name}samples", f"Training samples{of}", note(said), pictures(found.samples))
    judged = found.judged
    if isinstance(judged, Missing):
        sections.add(f"{name}network", f"Network{of}", _missing(judged))
        return
    loaded = judged.loaded
    weights = "the averaged weights (EMA)" if loaded.weights == "ema" else "the weights"
    count = f"{len(judged.index):,} of {judged.of:,} validation images"
    spaced = "" if len(judged.index) == judged.of else ", evenly spaced"
    said = (
        f"{loaded.path.name}, {weights}, decisions of {loaded.head.replace('_', ' ')}: {judged.top1:.2f}% of {count}"
        f"{spaced}, in float32 on {judged.device}."
    )
    sections.add(f"{name}confusion", f"Confusions{of}", note(said), *_confusions(sections, judged, name))
    sections.add(f"{name}worst", f"Worst classes{of}", *_worst(judged))
    sections.add(f"{name}tokens", f"Tokens{of}", *_tokens(sections, judged, name))


def _missing(part: Missing) -> Html:
    return note(f"Not shown: {part.why}")


def _confusions(sections: Sections, judged: Judged, name: str) -> Sequence[Html]:
    pairs = judged.confused(_PAIRS)
    rows = [(true, taken, count, images) for true, taken, count, images in pairs]
    head = ["true class", "taken for", "times", "images of the true class"]
    listed = table(head, rows, "Pairs that are confused most", [2, 3]) if rows else note("No image was confused.")
    if len(judged.names) > MOST_CLASSES:
        return [listed]
    figure = figures.confusion(judged.confusion(), judged.names)
    caption = "Rows are true classes, columns the network's decisions in the same order."
    worst = f" Most often, {rows[0][0]} was taken for {rows[0][1]}: {rows[0][2]} times." if rows else ""
    drawn = sections.plot(f"{name}confusion", figure, f"Confusion matrix. {caption}{worst}", caption)
    return [drawn, element("h3", "Pairs that are confused most"), listed]


def _worst(judged: Judged) -> Sequence[Html]:
    if not judged.worst:
        return [note("Every image that was evaluated was recognised.")]
    out = [note("The classes with the smallest share of recognised images, and some of their images that were not.")]
    for each in judged.worst:
        out.append(element("h3", f"{each.name}: {each.hits} of {each.images} recognised"))
        out.append(pictures(each.mistakes))
    return out


def _tokens(sections: Sections, judged: Judged, name: str) -> Sequence[Html]:
    out = [element("h3", "Cosine of the two tokens")]
    if isinstance(judged.cosines, Missing):
        out.append(_missing(judged.cosines))
    else:
        first, last = judged.cosines[0], judged.cosines[-1]
        caption = f"Mean over {judged.token_images} validation images: {first:.2f} at the input, {last:.2f} at the end."
        shows = f"Cosine of class and distillation token by layer. {caption}"
        out.append(sections.plot(f"{name}cosine", figures.cosines(judged.cosines), shows, caption))
    out.append(element("h3", "Attention"))
    if isinstance(judged.maps, Missing):
        return [*out, _missing(judged.maps)]
    out.append(
        note("Attention of the last block, mean over heads: the more a token looks at a patch, the more orange it is.")
    )
    rows = joined(pictures(row) for row in judged.maps)
    return [*out, element("div", rows, class_="three")]
