"""Every command on every kind of wrong path: one sentence, exit status 2, and the disk as it was."""

import builtins
import errno
import io
import os
import re
import resource
import signal
import sys
from pathlib import Path

import pytest

import runs
from fastdeit.commands import budget, convert, export, label, predict, report, train
from fastdeit.commands import eval as evaluate
from system import bind_socket

SECONDS = 30  # after which a command is taken to wait for a fifo
REMEDY = re.compile(
    r"\b(check|give|name|put|write|make|choose|remove|convert|fetch|run|free|raise|change|leave|save|create|copy)\b",
    re.I,
)


@pytest.fixture(scope="session")
def student(data, tmp_path_factory):
    """A checkpoint of a small student, and the words that train such a one."""
    folder = tmp_path_factory.mktemp("student")
    words = (
        "deit_tiny --model.img_size 32 --model.patch_size 8 --model.embed_dim 48 --model.depth 1 --model.num_heads 2 "
        "--run.epochs 1 --run.global_batch 32 --run.device cpu --run.compile off --run.tensorboard False "
        "--run.progress False --data.loader torch --data.stage host --data.threads 1 --departures.mix_group 8 "
        f"--data.train {data}/train.beton"
    ).split()
    recipe = train.parse_recipe([*words, "--run.output", str(folder)]).resolved()
    runs.train(recipe)
    return runs.newest(recipe), words


@pytest.fixture
def commands(data, images, student, teacher_checkpoint, tmp_path):
    """Each command with the place of a path in it: the function to call, and the words, one of them PATH."""
    weights, words = student
    taught = ["--objective.distillation", "hard", "--teacher.name", "resnet10t", "--teacher.checkpoint"]
    output = ["--run.output", f"{tmp_path}/out"]
    plain = ("--config", "--data.train", "--data.val", "--data.cache_dir", "--model.init", "--run.resume")
    training = {
        **{name: [*words, *output, name, "PATH"] for name in plain},
        "--teacher.checkpoint": [*words, *output, *taught, "PATH"],
        "--teacher.labels": [*words, *output, *taught, str(teacher_checkpoint), "--teacher.labels", "PATH"],
        "--run.output": [*words, "--run.output", "PATH"],
    }
    labelling = [*words, *output, *taught]
    source, dest = str(images / "val"), f"{tmp_path}/dest.beton"
    return {
        **{f"train {name}": (train.main, given) for name, given in training.items()},
        "eval CHECKPOINT": (evaluate.main, ["PATH", f"{data}/val.beton", "--device", "cpu"]),
        "eval VAL": (evaluate.main, [str(weights), "PATH", "--device", "cpu"]),
        "label --teacher.checkpoint": (label.main, [*labelling, "PATH", "--teacher.labels", f"{tmp_path}/labels"]),
        "label --teacher.labels": (label.main, [*labelling, str(teacher_checkpoint), "--teacher.labels", "PATH"]),
        "predict MODEL": (predict.main, ["PATH", str(next((images / "val").rglob("*.jpg"))), "--device", "cpu"]),
        "export CHECKPOINT": (export.main, ["PATH", f"{tmp_path}/exported", "--formats", "timm"]),
        "budget --config": (budget.main, ["--config", "PATH"]),
        "budget --data.train": (budget.main, ["deit_tiny", "--data.train", "PATH"]),
        "report RUN": (report.main, ["PATH", "--no-model", "--output", f"{tmp_path}/page.html"]),
        "report --output": (report.main, [str(weights.parents[1]), "--no-model", "--output", "PATH"]),
        "convert SOURCE": (convert.main, ["PATH", dest]),
        "convert webdataset:": (convert.main, ["webdataset:PATH", dest]),
        "convert cifar:": (convert.main, ["cifar:PATH", dest]),
        "convert imagenet:": (convert.main, ["imagenet:PATH", dest]),
        "convert DEST": (convert.main, [source, "PATH"]),
        "convert DEST of shards": (convert.main, [source, "PATH", "--format", "webdataset"]),
        "convert --class-names": (convert.main, [source, dest, "--class-names", "PATH"]),
        "convert --real-labels": (convert.main, [source, dest, "--real-labels", "PATH"]),
        "convert --verify": (convert.main, ["--verify", "PATH"]),
        "convert --against": (convert.main, ["--verify", f"{data}/val.beton", "--against", "PATH"]),
    }


NOWHERE = {"below a file", "below /proc", "no such user", "no path", "long"}
# Kinds that are a mistake in what is written. What may stand in the way of a conversion is for its own tests.
OUTPUTS = {
    "train --data.cache_dir": NOWHERE | {"file", "empty", "fifo", "loop", "dangling", "/dev/null"},
    "train --run.output": NOWHERE | {"file", "empty", "fifo", "loop", "dangling", "/dev/null"},
    "label --teacher.labels": NOWHERE | {"file", "empty", "fifo", "loop", "dangling", "/dev/null"},
    "convert DEST": NOWHERE | {"missing", "newline"},
    "convert DEST of shards": NOWHERE | {"missing", "newline"},
}


def kinds(folder):
    """Wrong paths by their kind, made in `folder` where they exist."""
    (folder / "file").write_text("neither this nor that")
    (folder / "empty").write_text("")
    (folder / "page").write_text("<!DOCTYPE html><html><body>404</body></html>")
    (folder / "folder").mkdir()
    (folder / "folder" / "note").write_text("mine")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "fifo")
    bind_socket(folder / "socket")
    (folder / "unreadable").write_text("secret")
    made = ("file", "empty", "page", "folder", "loop", "dangling", "fifo", "socket", "unreadable")
    return {
        **{kind: str(folder / kind) for kind in made},
        "missing": str(folder / "no" / "such"),
        "below a file": str(folder / "file" / "below"),
        "/dev/null": "/dev/null",
        "/dev/zero": "/dev/zero",
        "below /proc": "/proc/fastdeit/x",
        "no such user": "~nosuchuser/x",
        "no path": "",
        "newline": str(folder / "no\nsuch" / "name"),
        "long": str(folder / ("x" * 300)),
    }


@pytest.fixture
def unreadable(monkeypatch):
    """Function: the operating system refuses to open this file, also for root."""

    def forbid(path):
        def refusing(function):
            def opened(file, *args, **kwargs):
                if not isinstance(file, int) and os.fspath(file) == path:
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), file)
                return function(file, *args, **kwargs)

            return opened

        monkeypatch.setattr(builtins, "open", refusing(builtins.open))
        monkeypatch.setattr(io, "open", refusing(io.open))
        monkeypatch.setattr(os, "open", refusing(os.open))

    return forbid


def on_disk(folder):
    """Everything below a folder: its kind, its time and what it holds."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(root, name)
            status = os.lstat(path)
            held = Path(path).read_bytes() if os.path.isfile(path) and name != "unreadable" else None
            found[path] = (status.st_mode, status.st_size, status.st_mtime_ns, held)
    return found


def call(main, words, monkeypatch):
    """The exit status of a command; an exception is a traceback to its user."""

    def waited(*_):
        raise TimeoutError(f"{words} waits")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["fastdeit", *words])
    alarm = signal.signal(signal.SIGALRM, waited)
    signal.alarm(SECONDS)
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)
        signal.signal(signal.SIGTERM, before)
    return 0


def judge(command, kind, path, status, said, printed):
    """What is wrong with how a command ended; nothing: an empty list."""
    found = []
    # A data set that is there and does not open is what --verify is to find.
    finding = command == "convert --verify" and status == 3
    text = printed if finding else said
    if status != 2 and not finding:
        found.append(f"status {status}")
    lines = said.splitlines()
    if not finding and (len(lines) != 1 or not lines[0].startswith("error: ")):
        found.append("not one sentence")
    shown = path.replace("\n", "\\n") or ("after the colon" if ":" in command else "is empty")
    if "--class-names" not in text and shown.partition("/x")[0] not in text.replace("\n", "\\n"):
        found.append("the path is not named")
    if not REMEDY.search(text.replace(shown, "")):
        found.append("no remedy")
    return [f"{command}, {kind}: {what}: {text!r}" for what in found]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train --run.output", "label --teacher.labels"])
def test_outputs_on_a_full_disk(command, commands, small_files, tmp_path, capsys, monkeypatch):
    """A limit on the size of files stands in for it, since it makes writing fail in the same place."""
    main, words = commands[command]
    small_files(100)
    status = call(main, [word.replace("PATH", f"{tmp_path}/made") for word in words], monkeypatch)
    small_files(resource.RLIM_INFINITY)
    said = capsys.readouterr().err
    assert status == 2, said
    assert re.search(rf"^error: {tmp_path}/made\S*: (.*: )?File too large: \S.*\n$", said, re.M)
    assert sorted(path.name for path in (tmp_path / "made").glob("*")) in ([], ["labels.lock"])


@pytest.mark.slow
def test_every_command_on_every_kind_of_wrong_path(commands, tmp_path, capsys, monkeypatch, unreadable):
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    made = kinds(wrong)
    unreadable(made["unreadable"])
    problems = []
    for command, (main, words) in commands.items():
        for kind, path in made.items():
            if kind not in OUTPUTS.get(command, made):
                continue
            before = on_disk(tmp_path)
            try:
                status = call(main, [word.replace("PATH", path) for word in words], monkeypatch)
            except Exception as error:
                capsys.readouterr()
                problems.append(f"{command}, {kind}: a traceback: {error!r}")
                continue
            printed, said = capsys.readouterr()
            problems += judge(command, kind, path, status, said, printed)
            if (after := on_disk(tmp_path)) != before:
                problems.append(f"{command}, {kind}: the disk has changed: {set(before.items()) ^ set(after.items())}")
    assert not problems, "\n".join(problems)
