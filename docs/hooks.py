"""What the documentation site needs beside its pages: MkDocs calls the functions, mkdocstrings the class.

The pages are written for viewers such as GitHub's. There, links may leave docs/; on the site, files of examples/ are
copied, and other links out of docs/ become plain text.
"""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_OUT = re.compile(r"\[([^\]]*)\]\(\.\./([^)]*)\)")
# A line such as "img_size  None: the recipe's": names, at least two spaces, and what they mean.
_COLUMNS = re.compile(r"^(\w[\w*, ]*?)  +(\S.*)$")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    root = Path(config.docs_dir).parent
    for path in sorted((root / "examples").iterdir()):
        files.append(File.generated(config, f"examples/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _OUT.sub(lambda link: f"[{link[1]}]({link[2]})" if link[2].startswith("examples/") else link[1], markdown)


class Columns(griffe.Extension):
    """Turns the columns of a docstring, "name  meaning", into a list."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)


def listed(text: str) -> str:
    """`text` with its columns as a Markdown list; a line that continues one is indented there."""
    lines: list[str] = []
    within = False
    for line in text.splitlines():
        column = _COLUMNS.match(line)
        if column:
            names = ", ".join(f"`{name.strip()}`" for name in column[1].split(","))
            lines += ([] if within else [""]) + [f"- {names}: {column[2]}"]
        elif within and line.startswith(" "):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
        within = column is not None or (within and line.startswith(" "))
    return "\n".join(lines)
