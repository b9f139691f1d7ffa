"""Turn a command line and a file into a recipe."""

import contextlib
import dataclasses
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeVar, get_type_hints

from fastdeit.config import LATER, SOFT_DEFAULTS, Recipe, upgraded
from fastdeit.effects import check_given, fields
from fastdeit.help import page
from fastdeit.option_names import check_options, with_values
from fastdeit.pipelines.console import Steady, answer, discard, settle
from fastdeit.pipelines.errors import UserError, os_sentence, printable
from fastdeit.pipelines.formats.files import check_regular, read_text
from fastdeit.pipelines.parsing import MAX_TOML, parse_json, parse_toml
from fastdeit.pipelines.terminal import colours, escape_streams
from fastdeit.recipes import RECIPES, recipe_named
from fastdeit.sections import COMPAT, COMPAT_RUN
from fastdeit.streams import hold_descriptors
from fastdeit.version import __version__

T = TypeVar("T")

# `~` or `~user` at the start of a path: a word, an option's value, the part after a source's prefix or #labels=.
_HOME = re.compile(r"(^(?:--[^=]+=)?(?:torchvision:\w+:|[a-z0-9]+:)?|(?<=#labels=))(~[^/:#]*)")


def run(main: Callable[[], T]) -> T:
    """Call `main`; an error that the user can fix ends the program with its one sentence and exit status 2.

    These are UserError, and OSError about a path or about a full, read-only or failing disk. Any other exception is a
    bug and passes through: a traceback, and exit status 1. Ctrl-C prints "interrupted" and gives status 130, even if a
    library turns the KeyboardInterrupt into another exception. SIGTERM gives status 143, even in the first
    process of a container, which would ignore it by default. If the reader of stdout has gone, as under `| head`, the
    program ends without a word and with status 141. From this call on, stdout and stderr escape control characters.
    """
    hold_descriptors()
    escape_streams()
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.default_int_handler(number, frame)

    main_thread = threading.current_thread() is threading.main_thread()  # only this thread handles signals
    noting = main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if noting:
        signal.signal(signal.SIGINT, note)
    terminable = main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if terminable:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sentence: str | None = None
    try:
        if sys.argv[1:] == ["--version"]:
            answer(f"fastdeit {__version__}")
            sys.exit()
        return _flushed(main)
    except KeyboardInterrupt:
        came.append(signal.SIGINT)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            discard(sys.stdout)  # with its buffer, which Python would try to write again
            sys.exit(128 + signal.SIGPIPE)
        sentence = os_sentence(error) if isinstance(error, OSError) else None
        if isinstance(error, UserError):
            sentence = str(error)
        if sentence is None and not came:
            raise
    finally:
        if noting:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if terminable:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if came or sentence is None:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    print(f"error: {printable(sentence)}", file=sys.stderr)
    settle()
    sys.exit(2)


def _flushed(main: Callable[[], T]) -> T:
    """Call `main`, then flush stdout. Otherwise Python would do so at exit, too late to report an error."""
    try:
        result = main()
    except SystemExit as end:
        if not end.code:  # any other status says that the command has failed already
            _flush()
        raise
    _flush()
    return result


def _flush() -> None:
    if not sys.stdout.closed:
        sys.stdout.flush()


def _reader_has_gone() -> bool:
    """Whether stdout is a pipe or socket that nobody reads any more."""
    if isinstance(sys.stdout, Steady) and isinstance(sys.stdout.failure, BrokenPipeError):
        return True  # it leads to /dev/null by now
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):  # it is closed, or no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def check_least(options: object, **least: int) -> None:
    """Raise UserError if an attribute of `options` is below its least value; None passes."""
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise UserError(f"--{name} {value}: give at least {bound}")


def program(command: str) -> str:
    """The name under which a command was called: `fastdeit train`, or `fastdeit-train`."""
    typed = f"fastdeit {command}"
    return typed if sys.argv[0] == typed else f"fastdeit-{command}"


def parse(options: type[T], prog: str, args: Sequence[str] | None = None) -> T:
    """Parse the command line into the dataclass `options`, after `words`."""
    import tyro

    args = words(sys.argv[1:] if args is None else args)
    with _coloured(args):
        return tyro.cli(options, prog=prog, args=args)


def _coloured(args: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """Lets tyro colour its messages unless `args`, which the messages repeat, contain control characters."""
    return colours() if all(map(str.isprintable, args)) else contextlib.nullcontext()


def words(args: Sequence[str]) -> list[str]:
    """The words of a command line with `~` expanded in every path, also after `--option=` and `cifar:`.

    A shell expands it only at the start of a word. Raises UserError for an empty word, an unknown user's home, and a
    word that no path can hold.
    """
    before = ["", *(f" of {word}" if word.startswith("--") else "" for word in args)]
    return [_word(word, of) for word, of in zip(args, before, strict=False)]


def _word(word: str, of: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if not value and (equals or not option):
        raise UserError(f"the value{f' of {option}' if option else of} is empty: give one, or leave the option out")
    try:
        if b"\0" in os.fsencode(word):
            raise UserError(f"{word!r}{of} holds a zero byte, which no path can: remove it")
    except UnicodeEncodeError as error:
        raise UserError(f"{word!r}{of} is not valid text for a path: write it in UTF-8") from error

    def home(match: re.Match[str]) -> str:
        expanded = os.path.expanduser(match[2])
        if expanded.startswith("~"):
            raise UserError(f"{match[2]} in {word}: no such user here; for a file of that name give its full path")
        return match[1] + expanded

    return _HOME.sub(home, word)


def parse_recipe(args: Sequence[str] | None = None) -> Recipe:
    """The recipe that `RECIPE [--config FILE] [--section.field value ...]` describes, not yet resolved.

    A file is TOML or JSON with the sections and fields of a recipe; its `name` is the recipe to start from. A run's
    `recipe.json` starts the same run again. The command line wins over the file, and the file over the named recipe.
    A boolean option without a value means True. Raises UserError for an unknown recipe, for an unknown field (the error
    suggests the nearest ones), and for a field that was given but has no effect.
    """
    args, file = _take_config(words(sys.argv[1:] if args is None else args))
    args = with_values(_help(args))
    values = _read_config(file) if file else {}
    missing = _missing(values)
    if file and any(word.startswith("--compat") for word in args):
        _drop_compat(values)
    word = args[0] if args and not args[0].startswith("-") else None
    if word is not None:
        recipe_named(word)
    check_options(args[1:] if word is not None else args)
    if file and word is None and {"-h", "--help"} & set(args):
        file = None
    named = values.pop("name", None)
    if file and named not in (*RECIPES, None):
        if missing:
            raise UserError(
                f"{file}: there is no recipe '{named}': set name to one of {', '.join(RECIPES)}. (Only a complete "
                f"recipe, as a run stores it, may use another name; this file lacks {', '.join(missing[:3])})"
            )
        if word is not None:
            raise UserError(f"{file} is the stored recipe '{named}': leave out {word}, or use a file without a name")
        base = recipe_from_dict({"name": named, **values}, file=file)
        recipe = recipe_from_dict({"name": named, **values}, args, file)
    else:
        if file and word is None and named is None:
            raise UserError(f"{file} does not name its recipe: put one of {', '.join(RECIPES)} before --config")
        if file and None not in (word, named) and word != named:
            raise UserError(f"the command line names the recipe {word}, {file} names {named}: leave one of them out")
        if file and word is None:
            args.insert(0, str(named))
        if args and args[0] in RECIPES:
            args[1:1] = words(_flatten(values, file))
        recipe = _parse(args)
        # A stored recipe is complete; the command line overrides its values.
        whole = file is not None and not missing
        base = recipe_from_dict({"name": args[0], **values}, file=file) if whole else RECIPES[args[0]]()
    where = f"{file} and the command line: " if file else ""
    check_given(recipe.resolved(), dataclasses.replace(base, compat=recipe.compat).filled(), where)
    return recipe


def _help(args: list[str]) -> list[str]:
    """Print a recipe's short page if `args` ask for it; else the words for tyro's page of all fields."""
    if args and args[0] in RECIPES and {"-h", "--help"} & set(args):
        recipe = RECIPES[args[0]]
        answer(page(recipe(), (recipe.__doc__ or "").partition("\n")[0], program("train")))
        sys.exit()
    return ["--help" if word == "--help-all" else word for word in args]


def _drop_compat(values: dict[str, Any]) -> None:
    """Remove the values that the file's own compat decided; keep the others."""
    compat = values.get("compat", "paper")
    if compat not in ("paper", "released"):
        return  # the parser refuses it
    alpha, tau = SOFT_DEFAULTS[compat]
    decided = {
        "departures": dataclasses.asdict(COMPAT[compat]),
        "objective": {"alpha": alpha, "tau": tau},
        "run": COMPAT_RUN[compat],
    }
    for section, defaults in decided.items():
        given = values.get(section)
        if isinstance(given, dict):
            values[section] = {k: v for k, v in given.items() if k not in defaults or v != defaults[k]}


def _parse(args: list[str]) -> Recipe:
    import tyro  # imported here: the benchmarks on a GPU run without it

    # Without the other recipes, tyro takes half the time, and suggests none of their options.
    chosen = {args[0]: RECIPES[args[0]]} if args and args[0] in RECIPES else RECIPES
    with _coloured(args):
        return tyro.cli(
            tyro.extras.subcommand_type_from_defaults(
                {name: make() for name, make in chosen.items()},
                {name: (make.__doc__ or "").partition("\n")[0] for name, make in chosen.items()},
            ),
            args=args,
            prog=program("train"),
            description="Train a DeiT, or a convnet teacher. --config FILE reads a recipe from TOML or JSON.",
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
            use_underscores=True,
        )


def _missing(values: dict[str, Any]) -> list[str]:
    """Fields of a recipe that a file's `values` lack; none in a stored recipe, whichever version wrote it."""
    held = {f"{section}.{name}" for section, given in values.items() if isinstance(given, dict) for name in given}
    held |= LATER
    return [name for name in fields(Recipe(name="")) if name not in held and name not in values]


def recipe_from_dict(values: dict[str, Any], more: Sequence[str] = (), file: Path | None = None) -> Recipe:
    """The recipe that `Recipe.to_dict` wrote, overridden by the arguments `more`.

    Raises UserError for an unknown field, which it names, and for a value of the wrong type. The values may come from
    an untrusted file; only plain JSON types are read.
    """
    import tyro

    values = upgraded(values)
    args = [*_flatten({k: v for k, v in values.items() if k != "name"}, file or Path("the stored recipe")), *more]
    args = words(args)
    try:
        default = Recipe(name=str(values.get("name", "recipe")))
        return tyro.cli(
            Annotated[Recipe, tyro.conf.AvoidSubcommands],
            args=args,
            default=default,
            config=(tyro.conf.FlagConversionOff,),
            use_underscores=True,
            console_outputs=False,
        )
    except SystemExit as error:
        raise UserError(f"{file or 'the stored recipe'} does not fit this version of fastdeit") from error


def _take_config(args: list[str]) -> tuple[list[str], Path | None]:
    for i, arg in enumerate(args):
        if arg == "--config":
            if i + 1 == len(args):
                raise UserError("--config needs a file name")
            return args[:i] + args[i + 2 :], Path(args[i + 1])
        if arg.startswith("--config="):
            return args[:i] + args[i + 1 :], Path(arg.partition("=")[2])
    return args, None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        check_regular(path)
        text = read_text(path, MAX_TOML)
        values = parse_json(text) if path.suffix == ".json" else parse_toml(text)
    except OSError as error:
        raise UserError(os_sentence(error)) from error
    except ValueError as error:  # also raised for a file that is not UTF-8
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise UserError(f"{path} is not valid {kind} ({error}): correct it, or give another file") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not a recipe's sections")
    if not values:
        raise UserError(f"{path} holds no settings: leave out --config, or give another file")
    return upgraded(values)


def _flatten(values: dict[str, Any], file: Path | None) -> list[str]:
    """`values` as command-line arguments. Raises UserError for an unknown section or field."""
    args: list[str] = []
    sections = get_type_hints(Recipe)
    for section, given in values.items():
        if section not in sections:
            raise UserError(f"{file}: '{section}' is not a section of a recipe; the sections are {', '.join(sections)}")
        if not dataclasses.is_dataclass(sections[section]):
            args += [f"--{section}", str(given)]
            continue
        if not isinstance(given, dict):
            raise UserError(f"{file}: '{section}' must be a section with fields, not {given!r}")
        known = {f.name for f in dataclasses.fields(sections[section])}
        for name, value in given.items():
            if name not in known:
                raise UserError(f"{file}: '{section}.{name}' is not a field; the fields are {', '.join(sorted(known))}")
            words = value if isinstance(value, list) else [value]
            args += [f"--{section}.{name}", *(str(w) for w in words)]
    return args
