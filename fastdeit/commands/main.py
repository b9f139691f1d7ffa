"""`fastdeit`: all commands under one name. `fastdeit train ...` is `fastdeit-train ...`."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from fastdeit.pipelines.terminal import escape_streams
from fastdeit.version import __version__

# What each module of `fastdeit.commands` does; only the one that is called is imported.
COMMANDS = {
    "convert": "write labelled images in a format that training reads by index, or verify a data set",
    "train": "train a recipe; the same command resumes it",
    "eval": "accuracy of a checkpoint on a data set",
    "predict": "the most probable classes of images",
    "export": "write a checkpoint for timm, transformers, ONNX or torch.export",
    "report": "write a page with the curves, scores and pictures of one or more runs",
    "label": "store a teacher's labels for a whole run",
    "budget": "what a run will take on some GPUs: time, memory, cores, energy, cost",
    "doctor": "what this machine can use for training, and what to do about the rest",
    "demo": "train and distil a small DeiT on scikit-learn's digits, in a few minutes",
    "completion": "a script for bash or zsh that completes all of this",
}


def usage() -> str:
    """The page that `fastdeit --help` prints."""
    lines = [f"  {name:10} {purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join([
        "usage: fastdeit COMMAND [options]",
        "",
        "Train Data-efficient image Transformers (DeiT) fast, exactly, and within a budget.",
        "",
        *lines,
        "",
        "fastdeit COMMAND --help explains a command. On several GPUs, torchrun starts training:",
        "  torchrun --standalone --nproc_per_node=8 -m fastdeit train RECIPE ...",
    ])  # fmt: skip


def main(args: Sequence[str] | None = None) -> None:
    """Call the command that the first word names, with the other words."""
    escape_streams()
    words = list(sys.argv[1:] if args is None else args)
    if words[:1] in (["-h"], ["--help"]):
        _answer(usage())
        return
    if words == ["--version"]:
        _answer(f"fastdeit {__version__}")
        return
    if not words or words[0] not in COMMANDS:
        print(_mistake(words), file=sys.stderr)
        sys.exit(2)
    # The commands read the rest of the words from here, and name themselves after the first.
    sys.argv = [f"fastdeit {words[0]}", *words[1:]]
    importlib.import_module(f"fastdeit.commands.{words[0]}").main()


def _answer(text: str) -> None:
    from fastdeit.cli import run
    from fastdeit.pipelines.console import answer

    run(lambda: answer(text))


def _mistake(words: Sequence[str]) -> str:
    if not words:
        return f"{usage()}\n\nerror: name a command"
    close = difflib.get_close_matches(words[0], COMMANDS, n=1)
    hint = f"did you mean 'fastdeit {close[0]}'?" if close else f"choose one of {', '.join(COMMANDS)}"
    return f"error: there is no command {words[0]!r}: {hint}"


if __name__ == "__main__":
    main()
