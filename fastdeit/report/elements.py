"""Builds HTML elements. They escape every text, since names and logs come from untrusted files."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastdeit.pipelines.errors import printable

if TYPE_CHECKING:
    from fastdeit.report.pictures import Picture

_SIDE = 128  # pixels of a picture's longer side at most
_SMALL = 64  # up to this side, a picture is stored without loss


class Html(str):
    """Text that is already markup."""


def text(value: Any) -> Html:
    """A value as text: control characters and markup are escaped."""
    return value if isinstance(value, Html) else Html(html.escape(printable(str(value))))


def joined(parts: Iterable[Html]) -> Html:
    return Html("\n".join(parts))


def element(name: str, content: Any, **attributes: Any) -> Html:
    """An element; `class_` is its class."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{given}>{text(content)}</{name}>")


def paragraph(content: Any) -> Html:
    return element("p", content)


def note(content: Any) -> Html:
    return element("p", content, class_="note")


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], name: str, numbers: Sequence[int] = ()) -> Html:
    """A table whose first column names its rows; it scrolls if too wide. `numbers`: the numeric columns."""

    def kind(column: int) -> dict[str, str]:
        return {"class_": "number"} if column in numbers else {}

    top = joined(element("th", cell, scope="col", **kind(column)) for column, cell in enumerate(head))
    lines = []
    for row in rows:
        first = element("th", row[0], scope="row", **kind(0))
        rest = joined(element("td", cell, **kind(column)) for column, cell in enumerate(row[1:], 1))
        lines.append(element("tr", joined([first, rest])))
    whole = [element("thead", element("tr", top)), element("tbody", joined(lines))]
    region = {"class_": "wide", "role": "region", "aria_label": name, "tabindex": "0"}
    return element("div", element("table", joined(whole)), **region)


def details(summary: str, content: Html) -> Html:
    return element("details", joined([element("summary", summary), content]))


def plot(name: str, shows: str, caption: str) -> Html:
    """The empty element of a figure, in which the page's script draws."""
    place = element("div", "", id=name, class_="plot", role="img", aria_label=shows)
    return element("figure", joined([place, element("figcaption", caption)]))


def picture(shown: Picture) -> Html:
    from PIL import Image

    image = Image.fromarray(shown.pixels)
    small, buffer = max(image.size) <= _SMALL, io.BytesIO()
    if not small:
        image.thumbnail((_SIDE, _SIDE))
    image.save(buffer, **({"format": "PNG", "optimize": True} if small else {"format": "JPEG", "quality": 85}))
    data = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    kind = ' class="small"' if small else ""
    tag = f'<img src="{data}" alt="{text(shown.shows)}" width="{image.width}" height="{image.height}"{kind}>'
    return element("figure", joined([Html(tag), element("figcaption", shown.caption)]))


def pictures(shown: Iterable[Picture]) -> Html:
    return element("div", joined(picture(each) for each in shown), class_="pictures")


@dataclass
class Sections:
    """Collects the sections of a page, the links to their headings, and the figures."""

    parts: list[Html] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, title: str, *content: Html) -> None:
        self.links.append((name, title))
        heading = element("h2", title, id=name)
        self.parts.append(element("section", joined([heading, *content]), aria_labelledby=name))

    def plot(self, name: str, figure: dict[str, Any], shows: str, caption: str) -> Html:
        self.figures[f"figure-{name}"] = figure
        return plot(f"figure-{name}", shows, caption)
