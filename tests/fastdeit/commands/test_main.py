"""`fastdeit`: the commands under one name; each is the program of its own name."""

import pytest

from fastdeit import __version__
from fastdeit.commands.main import COMMANDS, main
from forked import succeed
from system import run_python


def test_the_page_fits_a_screen_and_names_every_command(capsys):
    main(["--help"])
    page = capsys.readouterr().out.splitlines()
    assert len(page) <= 24
    assert max(map(len, page)) <= 100
    assert [line.split()[0] for line in page if line.startswith("  ")][:-1] == list(COMMANDS)


def test_help_needs_no_heavy_library():
    code = "import sys; sys.argv[1:] = ['--help']; from fastdeit.commands.main import main; main(); " \
        "print(sorted({'torch', 'numpy', 'tyro', 'PIL'} & sys.modules.keys()))"  # fmt: skip
    assert run_python("-c", code).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a command"),
        (["trian"], "there is no command 'trian': did you mean 'fastdeit train'?"),
        (["xyz"], "choose one of convert, train"),
        (["../train"], "there is no command"),
        (["\x1b[31m"], r"there is no command '\x1b[31m'"),
    ],
)
def test_mistakes(words, said, ended):
    assert said in ended(2, main, words).err


@pytest.mark.slow
def test_every_command_explains_itself_under_the_name_that_was_typed():
    for command in COMMANDS:
        out, _ = succeed(main, [command, *(["deit_small"] if command == "train" else []), "--help"])
        assert f"fastdeit {command}" in out
        assert f"fastdeit-{command}" not in out.partition("\n\n")[0]


@pytest.mark.slow
def test_a_command_reads_the_words_after_its_name(tmp_path):
    process = run_python("-m", "fastdeit", "eval", tmp_path / "none.pt", tmp_path / "none.beton", status=2)
    assert "none.pt" in process.stderr


def test_the_version():
    for words in (["-m", "fastdeit", "--version"], ["-m", "fastdeit", "train", "--version"]):
        assert run_python(*words).stdout == f"fastdeit {__version__}\n"
