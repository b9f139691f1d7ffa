"""Every command of the README and of the documents is real: it parses."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from fastdeit.cli import parse_recipe
from fastdeit.commands.label import parse as parse_label

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def commands():
    """Each command of the documents' bash blocks, with continuation lines joined and comments dropped."""
    text = "\n".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
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
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in args)
    elif program == "fastdeit-train":
        parse_recipe(args).resolved()
    elif program == "fastdeit-label":
        parse_label(args)
    elif program == "fastdeit-convert":
        from fastdeit.commands.convert import Options

        tyro.cli(Options, args=args)
    elif program == "fastdeit-eval":
        from fastdeit.commands.eval import Options

        tyro.cli(Options, args=args)
    elif program == "fastdeit-doctor":
        assert not args
    elif program == "python":
        assert args[:2] == ["-m", "benchmarks"]
        assert (ROOT / "benchmarks" / f"{args[2]}.py").exists()
    else:
        assert program in ("sudo", "apt-get", "pip", "tensorboard"), words


def test_the_readmes_python_does_what_it_says(capsys):
    (code,) = PYTHON.findall((ROOT / "README.md").read_text())
    exec(code.replace(".cuda()", ""), {})
    assert capsys.readouterr().out == "[]\n"
