"""`fastdeit completion`: a script that completes commands, recipes and options in bash or zsh."""

import argparse
import dataclasses
import importlib
import sys
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastdeit.cli import run
from fastdeit.commands import budget
from fastdeit.commands.main import COMMANDS
from fastdeit.config import Recipe
from fastdeit.pipelines.console import answer
from fastdeit.recipes import RECIPES

Choices = dict[str, tuple[str, ...]]  # the options of a command, each with its values; empty: a file or a number

# Options of the commands that read them by hand.
_BY_HAND: dict[str, Choices] = {
    "train": {"--config": (), "--print-config": (), "--help-all": ()},
    "label": {"--config": (), "--first-epoch": (), "--end-epoch": (), "--topk": ()},
    "doctor": {"--json": ()},
    "demo": {},
    "completion": {},
}
PROGRAMS = ("fastdeit", *(f"fastdeit-{name}" for name in ("convert", "train", "eval", "label", "doctor")))
_BASH = """\
_fastdeit() {{
    local at=$COMP_CWORD command words=
    local word=${{COMP_WORDS[at]}} before=${{COMP_WORDS[at-1]}} program=${{COMP_WORDS[0]##*/}}
    COMPREPLY=()
    if [[ $program == fastdeit-* ]]; then
        command=${{program#fastdeit-}}
    else
        command=${{COMP_WORDS[1]}}
        at=$((at - 1))
    fi
    if ((at == 0)); then
        words='{commands} --help --version'
    else
        case "$command $before" in
{values}
            *)
                if [[ $word == -* ]]; then
                    case $command in
{options}
                    esac
                elif ((at == 1)); then
                    case $command in
{first}
                    esac
                fi ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _fastdeit {programs}
"""
_ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
autoload -Uz bashcompinit && bashcompinit
"""


def script(shell: Literal["bash", "zsh"]) -> str:
    """The completion script of all commands; zsh runs bash's. Where no word fits, the shell completes files."""
    options = {command: options_of(command) for command in COMMANDS}
    commands: dict[str, list[str]] = {}  # by their options' values
    for command, values in options.items():
        for option, words in values.items():
            if words:
                commands.setdefault(" ".join(words), []).append(f'"{command} {option}"')
    first = {"train": RECIPES, "label": RECIPES, "budget": RECIPES, "completion": ("bash", "zsh")}
    bash = _BASH.format(
        commands=" ".join(COMMANDS),
        values=_cases({"|".join(patterns): words for words, patterns in commands.items()}, 12),
        options=_cases({command: " ".join([*values, "--help"]) for command, values in options.items()}, 24),
        first=_cases({command: " ".join(words) for command, words in first.items()}, 24),
        programs=" ".join(PROGRAMS),
    )
    return bash if shell == "bash" else _ZSH + bash


def _cases(words: dict[str, str], indent: int) -> str:
    return "\n".join(f"{' ' * indent}{pattern}) words='{listed}' ;;" for pattern, listed in words.items())


def options_of(command: str) -> Choices:
    """The options of a command."""
    if command == "budget":
        own = (option for action in budget.arguments()._actions for option in action.option_strings)
        return _of_recipe() | {"--config": ()} | {option: () for option in own if option.startswith("--")}
    if command in ("train", "label"):
        return _of_recipe() | _BY_HAND[command]
    if command in _BY_HAND:
        return _BY_HAND[command]
    return _of_class(importlib.import_module(f"fastdeit.commands.{command}").Options)


def _of_recipe() -> Choices:
    out: Choices = {}
    for section, kind in get_type_hints(Recipe).items():
        if not dataclasses.is_dataclass(kind):
            out |= {f"--{section}": _choices(kind)} if section != "name" else {}
            continue
        for name, inner in get_type_hints(kind).items():
            out[f"--{section}.{name}"] = ("True", "False") if inner is bool else _choices(inner)
    return out


def _of_class(options: type) -> Choices:
    import tyro

    out: Choices = {}
    for name, kind in get_type_hints(options, include_extras=True).items():
        if tyro.conf.Positional not in get_args(kind)[1:]:
            out[f"--{name.replace('_', '-')}"] = tuple(RECIPES) if name == "recipe" else _choices(kind)
    return out


def _choices(kind: Any) -> tuple[str, ...]:
    """The words of each Literal in a type."""
    if get_origin(kind) is Literal:
        return tuple(map(str, get_args(kind)))
    return tuple(word for part in get_args(kind) for word in _choices(part))


def main() -> None:
    def go() -> None:
        parser = argparse.ArgumentParser(
            prog="fastdeit completion",
            description="Print a script that completes fastdeit's commands, recipes and options.",
            epilog="Write it to a file that your shell reads; docs/training.md names one.",
        )
        parser.add_argument("shell", choices=["bash", "zsh"])
        answer(script(parser.parse_args(sys.argv[1:]).shell).removesuffix("\n"))

    run(go)


if __name__ == "__main__":
    main()
