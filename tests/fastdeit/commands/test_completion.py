"""`fastdeit completion`: what a shell offers after each word, and that the commands accept it."""

import shlex
import shutil
import tomllib
from pathlib import Path

import pytest

from fastdeit.commands.completion import PROGRAMS, options_of, script
from fastdeit.commands.main import COMMANDS
from fastdeit.config import Recipe
from fastdeit.effects import fields
from fastdeit.recipes import RECIPES
from system import run, run_python

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    """Function: what bash offers where the last of these words is being typed."""
    file = tmp_path_factory.mktemp("completion") / "fastdeit.bash"
    file.write_text(script("bash"))

    def complete(*words):
        code = f"""
            source {shlex.quote(str(file))}
            complete -p {shlex.quote(words[0])} >/dev/null || exit 1
            COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}
            _fastdeit
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        done = run("bash", "--norc", "-uc", code, check=True)
        assert done.stderr == ""
        return done.stdout.split()

    return complete


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["fastdeit", ""], [*COMMANDS, "--help", "--version"]),
        (["fastdeit", "co"], ["convert", "completion"]),
        (["fastdeit", "train", ""], list(RECIPES)),
        (["fastdeit", "train", "deit_base_d"], ["deit_base_distilled", "deit_base_distilled_384"]),
        (["fastdeit-train", "fashion"], ["fashion_mnist_teacher", "fashion_mnist_distilled"]),
        (["fastdeit", "label", "deit_tiny_3"], ["deit_tiny_384"]),
        (["fastdeit", "budget", "deit_tiny_3"], ["deit_tiny_384"]),
        (["fastdeit", "budget", "--dead"], ["--deadline"]),
        (["fastdeit", "train", "deit_tiny", "--optim.we"], ["--optim.weight_decay"]),
        (["fastdeit", "train", "deit_tiny", "--print"], ["--print-config"]),
        (["fastdeit", "train", "deit_tiny", "--run.precision", ""], ["auto", "fp32", "bf16", "fp16"]),
        (["fastdeit-train", "deit_tiny", "--run.precision", "b"], ["bf16"]),
        (["fastdeit", "train", "deit_tiny", "--run.tensorboard", ""], ["True", "False"]),
        (["fastdeit", "convert", "images", "--max"], ["--max-side"]),
        (["fastdeit", "convert", "images", "--on-error", ""], ["fail", "skip"]),
        (["fastdeit", "eval", "--recipe", "deit_small_d"], ["deit_small_distilled", "deit_small_distilled_384"]),
        (["fastdeit", "export", "--formats", "t"], ["timm", "transformers", "torch"]),
        (["fastdeit", "completion", ""], ["bash", "zsh"]),
        (["fastdeit", "train", "deit_tiny", "--data.train", ""], []),  # bash then offers files
        (["fastdeit", "convert", ""], []),
        (["fastdeit", "unknown", "--x"], []),
    ],
)
def test_words_offered(completed, words, offered):
    assert completed(*words) == offered


def test_every_field_of_a_recipe_is_offered():
    assert {f"--{name}" for name in fields(Recipe(name="")) if name != "name"} <= options_of("train").keys()


@pytest.mark.slow
@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("train", "demo", "completion")])
def test_every_option_offered_is_one_of_the_commands_own(command):
    done = run_python("-m", "fastdeit", command, "--help")
    recipe = options_of("train").keys() if command in ("label", "budget") else set()
    missing = [option for option in options_of(command) if option not in recipe and option not in done.stdout]
    assert done.returncode == 0
    assert missing == []


def test_every_program_is_completed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(PROGRAMS) == sorted(project["scripts"])


@pytest.mark.slow
def test_zsh_offers_the_same(tmp_path):
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed (apt-get install zsh)")
    file = tmp_path / "fastdeit.zsh"
    file.write_text(script("zsh"))
    # A terminal of its own: zsh completes only there.
    code = f"""
        zmodload zsh/zpty
        zpty shell zsh -f -i
        zpty -w shell 'autoload -U compinit; compinit -u -d {tmp_path}/dump; source {file}; print rea""dy'
        zpty -r shell out '*ready*'
        zpty -w -n shell $'fastdeit train deit_base_tr\\t'
        zpty -r shell out '*transfer*'
        print -r -- "$out"
    """
    assert "deit_base_transfer" in run("zsh", "-f", "-c", code, timeout=60).stdout


def test_the_command_prints_the_script(capsys, ended):
    from fastdeit.commands.main import main

    main(["completion", "bash"])
    assert capsys.readouterr().out == script("bash")
    assert "choose from" in ended(2, main, ["completion", "tcsh"]).err
