"""The README and the documents are real: every command parses, every path exists."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

from benchmarks.__main__ import COMMANDS as BENCHMARKS
from fastdeit.cli import parse_recipe
from fastdeit.commands.budget import parse as parse_budget
from fastdeit.commands.label import parse as parse_label
from fastdeit.commands.train import PRINT
from fastdeit.recipes import RECIPES

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
FENCED = re.compile(r"```.*?```", re.DOTALL)
QUOTED = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
TOP = ("fastdeit", "kernels", "pipelines", "benchmarks", "tests", "docs", "typings", "examples")


def commands():
    """Each command of the documents' bash blocks, with continuation lines joined and comments dropped."""
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


COMMANDS = list(commands())


def test_the_readme_has_commands():
    programs = {words[0] for words in COMMANDS}
    assert {"make", "fastdeit-convert", "fastdeit-train", "fastdeit-eval", "fastdeit-doctor"} <= programs


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_is_understood(words):
    program, *args = words
    if program == "torchrun":
        start = next(i for i, w in enumerate(words) if w == "fastdeit.train")
        program, args = "fastdeit-train", words[start + 1 :]
    if program == "fastdeit":  # `fastdeit train` is `fastdeit-train`
        program, args = f"fastdeit-{args[0]}", args[1:]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in args)
    elif program == "fastdeit-train" and args[1:] == ["--help"]:
        assert args[0] in RECIPES
    elif program == "fastdeit-train":
        parse_recipe([word for word in args if word != PRINT]).resolved()
    elif program == "fastdeit-label":
        parse_label(args)
    elif program == "fastdeit-budget":
        parse_budget(args)
    elif program in [f"fastdeit-{name}" for name in ("convert", "eval", "predict", "export", "report")]:
        module = importlib.import_module(f"fastdeit.commands.{program.removeprefix('fastdeit-')}")
        tyro.cli(module.Options, args=args)
    elif program == "fastdeit-completion":
        assert args[0] in ("bash", "zsh")
    elif program in ("fastdeit-doctor", "fastdeit-demo"):
        assert not args
    elif program == "python":
        flag, module, *rest = args
        assert flag == "-m"
        if module == "benchmarks":
            assert rest[0] in BENCHMARKS
        elif module != "pytest":
            assert is_module(module)
    else:
        assert program in ("sudo", "apt-get", "pip", "tensorboard", "export", "mkdir"), words


def is_module(name):
    """Whether `python -m name` finds a file in the checkout."""
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def named(text):
    """Paths and modules of the checkout in backticks, each with whether it exists; NAME stands for any name."""
    for quoted in QUOTED.findall(FENCED.sub("", text).replace("NAME.", "*.").replace("NAME`", "*`")):
        if module := re.match(r"python -m ((?:benchmarks|tests|fastdeit)[\w.]*)", quoted):
            yield quoted, is_module(module[1])
        elif re.fullmatch(r"[\w./*-]+\.(?:py|c|md|jsonl)|(?:" + "|".join(TOP) + r")/[\w./*-]*", quoted):
            known = quoted.partition("/")[0] in TOP
            if known or ("/" in quoted and quoted.endswith(".py")):
                yield quoted, any(ROOT.glob(quoted.rstrip("/")))
            elif quoted.endswith(".py"):
                yield quoted, any(path for top in TOP[:5] for path in (ROOT / top).rglob(quoted))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_exist(document):
    text = document.read_text()
    missing = [name for name, exists in named(text) if not exists]
    missing += [link for link in LINK.findall(text) if not (document.parent / link).exists()]
    assert missing == []
