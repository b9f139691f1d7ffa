"""A reader that goes away, a full disk, a closed stdout: training goes on and the log says so."""

import os
import resource
import shutil
import signal
import sys

import pytest
from PIL import Image

from fastdeit import checkpoint
from run_logs import run_log
from runs import train
from system import run

PRINTS = """
import json, sys
from pathlib import Path
from fastdeit.streams import keep_streams
keep_streams()
from fastdeit.training.logs import RunLog
log = RunLog(Path(sys.argv[1]), active=True, tensorboard=False, progress=False)
for i in range(3000):
    log.say(f"sentence {i} of some length, so that buffers fill up")
    log.event("train", epoch=0, step=i, global_step=i)
print("a plain print")
log.close()
opened = open(Path(sys.argv[1]) / "other", "w")
assert opened.fileno() > 2
"""


@pytest.mark.parametrize("how", ["head", "full", "closed", "closed stderr"])
def test_output_that_cannot_be_written_is_noted_in_the_log(tmp_path, events, how):
    command = (
        f'"{sys.executable}" -c "$CODE" "{tmp_path}" '
        + {"head": "| head -n 1", "full": "> /dev/full", "closed": ">&-", "closed stderr": "2>&- > /dev/null"}[how]
    )
    done = run("bash", "-c", f"set -o pipefail; {command}", timeout=60, env={**os.environ, "CODE": PRINTS}, status=0)
    assert done.stderr == ""
    assert len(events(tmp_path, "train")) == 3000
    said = [event["text"] for event in events(tmp_path, "warning")]
    wanted = {"head": "Broken pipe", "full": "No space left on device"}.get(how)
    if wanted is None:
        assert said == []
    else:
        (text,) = said
        assert text.startswith("stdout cannot be written")
        assert wanted in text
    assert done.stdout == ("sentence 0 of some length, so that buffers fill up\n" if how == "head" else "")


@pytest.mark.slow
def test_training_outlives_the_reader_of_its_output(tiny, launch, events):
    recipe = tiny(run={"epochs": 2})
    process = launch(recipe, wait=False, stdout_reader="head -n 1")
    assert process.wait(timeout=120) == 0
    assert events(recipe.run.output, "end")
    assert any("Broken pipe" in e["text"] for e in events(recipe.run.output, "warning"))
    assert checkpoint.found(recipe.run.output / "checkpoints")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # in tensorboard's own thread
def test_a_tensorboard_folder_that_refuses_ends_no_run(tmp_path, events, capsys):
    with run_log(tmp_path, tensorboard=True) as log:
        log.event("train", epoch=0, step=0, global_step=0, loss=1.0)
        log._board.flush()
        shutil.rmtree(tmp_path / "tensorboard")
        (tmp_path / "tensorboard").write_text("in the way")
        for i in range(1, 200):  # its own thread writes when it likes
            log.event("train", epoch=0, step=i, global_step=i, loss=1.0)
        log.event("end", epoch=1)
    assert len(events(tmp_path, "train")) == 200
    (warning,) = [line["text"] for line in events(tmp_path, "warning")]
    assert warning.startswith("TensorBoard's files cannot be written")
    assert capsys.readouterr().out == f"warning: {warning}\n"
    with run_log(tmp_path, tensorboard=True) as blocked:  # from the start
        blocked.event("end", epoch=1)
    assert "TensorBoard's files cannot be written" in capsys.readouterr().out


def test_a_full_disk_costs_events_and_says_how_many(tmp_path, small_files, events, capsys):
    with run_log(tmp_path) as log:
        log.event("train", step=0)
        size = (tmp_path / "log.jsonl").stat().st_size
        small_files(size + 10)  # a torn line
        for i in range(1, 4):
            log.event("train", step=i)
        small_files(resource.RLIM_INFINITY)
        log.event("train", step=4)
    lines = events(tmp_path)
    assert [line.get("step", line["event"]) for line in lines] == [0, "warning", 4]
    assert "3 events are missing here" in lines[1]["text"]
    assert capsys.readouterr().out.count("log.jsonl cannot be written") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "budget deit_tiny", "budget deit_tiny --json", "train deit_tiny --print-config", "train deit_tiny --help",
        "doctor", "doctor --help", "completion bash", "--help", "--version", "train --version",
    ],
)  # fmt: skip
def test_an_answer_that_cannot_be_written_is_an_error(words):
    """Unlike a run, these commands are nothing but their output."""
    _refuses_a_full_stdout(words)


def _refuses_a_full_stdout(words):
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = run("bash", "-c", f'"{sys.executable}" -m fastdeit {words} > /dev/full', timeout=120, status=2, env=buffered)
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", ["budget deit_tiny", "train deit_tiny --help", "--help", "--version"])
def test_a_closed_stdout_is_no_error(words):
    done = run("bash", "-c", f'"{sys.executable}" -m fastdeit {words} >&-', timeout=60, status=0)
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("words", ["train deit_tiny --run.epochs abc", "eval x --bad", "convert --bad", "report --bad"])
def test_mistakes_are_explained_where_stdout_is_closed(words):
    done = run("bash", "-c", f'"{sys.executable}" -m fastdeit {words} >&-', timeout=60, status=2)
    assert "Traceback" not in done.stderr
    assert words.split()[-1] in done.stderr


@pytest.mark.slow
def test_scores_that_cannot_be_printed_are_an_error(tiny, tmp_path):
    """A run outlives its output; the commands that read its checkpoint do not."""
    recipe = tiny(run={"epochs": 1})
    train(recipe)
    image = tmp_path / "image.png"
    Image.new("RGB", (40, 30)).save(image)
    classes = tmp_path / "classes.csv"
    _refuses_a_full_stdout(f"eval {recipe.run.output} {recipe.data.val} --device cpu --per-class {classes}")
    assert classes.read_text().startswith("data,weights,class,")  # the CSV is written all the same
    _refuses_a_full_stdout(f"eval {recipe.run.output} {recipe.data.val} --device cpu --json")
    _refuses_a_full_stdout(f"predict {recipe.run.output} {image} --device cpu")
    scores = f'"{sys.executable}" -m fastdeit eval {recipe.run.output} {recipe.data.val} --device cpu'
    gone = run("bash", "-c", f"{scores} | true; exit ${{PIPESTATUS[0]}}", timeout=120, status=128 + signal.SIGPIPE)
    assert gone.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("words", ["budget deit_tiny", "completion bash", "doctor", "train deit_tiny --print-config"])
def test_a_reader_that_went_away_ends_a_command_in_silence(words):
    command = f'"{sys.executable}" -m fastdeit {words} | sleep 0; exit ${{PIPESTATUS[0]}}'
    done = run("bash", "-c", command, timeout=60, status=128 + signal.SIGPIPE)
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr
