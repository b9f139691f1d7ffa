"""The sections of a page that show a run's samples and its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from fastdeit.report import figures
from fastdeit.report.elements import Html, Sections, element, joined, note, pictures, table
from fastdeit.report.network import MOST_CLASSES, Findings, Judged
from fastdeit.report.pictures import Missing

_PAIRS = 20


def add_findings(sections: Sections, found: Findings, name: str, of: str) -> None:
    """Add the findings to a page. Section ids start with `name`; section titles end with `of`."""
    if isinstance(found.samples, Missing):
        sections.add(f"{name}samples", f"Training samples{of}", _missing(found.samples))
    else:
        said = "The run's first training samples as the network saw them, with their classes and augmentation."
        sections.add(f"{name}samples", f"Training samples{of}", note(said), pictures(found.samples))
    judged = found.judged
    if isinstance(judged, Missing):
        sections.add(f"{name}network", f"Network{of}", _missing(judged))
        return
    loaded = judged.loaded
    weights = "averaged weights (EMA)" if loaded.weights == "ema" else "weights without averaging"
    count = f"{len(judged.index):,} of {judged.of:,} validation images"
    spaced = "" if len(judged.index) == judged.of else ", evenly spaced"
    said = (
        f"Top-1 {judged.top1:.2f}% on {count}{spaced}. Checkpoint {loaded.path.name}, {weights}, "
        f"head: {loaded.head.replace('_', ' ')}; evaluated in float32 on {judged.device}."
    )
    title = "Confusion matrix" if len(judged.names) <= MOST_CLASSES else "Most confused pairs"
    sections.add(f"{name}confusion", f"{title}{of}", note(said), *_confusions(sections, judged, name))
    sections.add(f"{name}worst", f"Worst classes{of}", *_worst(judged))
    sections.add(f"{name}tokens", f"Tokens{of}", *_tokens(sections, judged, name))


def _missing(part: Missing) -> Html:
    return note(f"Not shown: {part.why}")


def _confusions(sections: Sections, judged: Judged, name: str) -> Sequence[Html]:
    pairs = judged.confused(_PAIRS)
    rows = [(true, taken, count, images) for true, taken, count, images in pairs]
    head = ["true class", "predicted class", "count", "images of the true class"]
    listed = (
        table(head, rows, "Most confused pairs", [2, 3])
        if rows
        else note("The network made no mistakes on these images.")
    )
    if len(judged.names) > MOST_CLASSES:
        return [listed]
    figure = figures.confusion(judged.confusion(), judged.names)
    caption = "Rows are true classes; columns are predicted classes, in the same order."
    worst = f" Most frequent mistake: {rows[0][0]} predicted as {rows[0][1]}, {rows[0][2]} times." if rows else ""
    drawn = sections.plot(f"{name}confusion", figure, f"Confusion matrix. {caption}{worst}", caption)
    return [drawn, element("h3", "Most confused pairs"), listed]


def _worst(judged: Judged) -> Sequence[Html]:
    if not judged.worst:
        return [note("Every evaluated image was classified correctly.")]
    out = [note("The classes with the lowest accuracy, and some of their mistakes.")]
    for each in judged.worst:
        out.append(element("h3", f"{each.name}: {each.hits} of {each.images} correct"))
        out.append(pictures(each.mistakes))
    return out


def _tokens(sections: Sections, judged: Judged, name: str) -> Sequence[Html]:
    out = [element("h3", "Cosine of the two tokens")]
    if isinstance(judged.cosines, Missing):
        out.append(_missing(judged.cosines))
    else:
        first, last = judged.cosines[0], judged.cosines[-1]
        images = f"{judged.token_images} validation images"
        caption = f"Mean over {images}: {first:.2f} at the input, {last:.2f} at the last layer."
        shows = f"Cosine of class and distillation token by layer. {caption}"
        out.append(sections.plot(f"{name}cosine", figures.cosines(judged.cosines), shows, caption))
    out.append(element("h3", "Attention"))
    if isinstance(judged.maps, Missing):
        return [*out, _missing(judged.maps)]
    out.append(
        note("Attention in the last block, averaged over heads. The more a token attends to a patch, the more orange.")
    )
    rows = joined(pictures(row) for row in judged.maps)
    return [*out, element("div", rows, class_="three")]
