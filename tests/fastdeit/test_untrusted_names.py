"""Untrusted names reach a terminal only as text, whichever file holds them.

Judge: the characters that terminals act on, from ECMA-48 and Unicode's bidirectional algorithm (UAX 9).
"""

import io
import json
import sys
import tarfile
from functools import partial

import pytest
import torch

from archives import jpeg, packed
from fastdeit.cli import run
from fastdeit.commands import convert, doctor, train
from fastdeit.commands import eval as evaluate
from fastdeit.commands.doctor_checks import Check
from fastdeit.inputs import check_class_names
from fastdeit.model.weights import describe
from fastdeit.pipelines.errors import printable
from fastdeit.pipelines.terminal import Escaping
from fastdeit.sections import IMAGENET_MEAN, IMAGENET_STD, TeacherConfig
from fastdeit.teacher.label_cache import LabelCache
from fastdeit.teacher.teacher import Teacher
from fastdeit.training.startup import _labels_sentence
from hostile import ACTED_ON, command, forked
from run_logs import open_log, run_log
from system import run_python
from tiny_datasets import image_folder, reseal

GOOD = "café 日本語 🦊"
JOINED = "👩\u200d🔬"  # two emoji and a joiner
# Colours, a cleared screen in 8-bit codes, a title, a bell, a reversed reading order, a byte that is not UTF-8, and
# lines that look like ours.
BAD = "\x1b[31m\x9b2J\x1b]0;x\x07\u202e\u2066\udc80\r\nerror: forged\n"
NAME = GOOD + JOINED + BAD
NO_LINES = NAME.replace("\r", "").replace("\n", "")
UTF8 = NAME.replace("\udc80", "")  # what files in UTF-8 can hold


def on_terminal(said):
    """Assert that a terminal shows `said` as text, on lines of ours, and that the letters are readable."""
    assert GOOD in said
    assert not ACTED_ON.search(said)
    assert not [line for line in said.splitlines() if line.startswith("error: forged")]


def folder_of(tmp_path, *files):
    """A source of one class with the name, and the output of its conversion."""
    (tmp_path / "images" / NAME).mkdir(parents=True)
    for i, data in enumerate(files):
        (tmp_path / "images" / NAME / f"{i}.jpg").write_bytes(data)
    return tmp_path / "images", tmp_path / "x.beton"


def empty_class(tmp_path):
    return command(convert.main, *folder_of(tmp_path))


def left_out(tmp_path):
    return command(convert.main, *folder_of(tmp_path, jpeg(), b"no image"), "--on-error", "skip")


def tar_member(tmp_path):
    name = UTF8.replace("\n", "")
    (tmp_path / "a.tar").write_bytes(packed({f"{name}.jpg": b"no image", f"{name}.cls": b"0"}, tarfile.PAX_FORMAT))
    return command(convert.main, tmp_path / "a.tar", tmp_path / "x.beton")


def parquet_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"image": [jpeg()], UTF8: [0], "other": [0]})
    parquet.write_table(table, tmp_path / "a.parquet")
    return command(convert.main, tmp_path / "a.parquet", tmp_path / "x.beton")


def archive_name(tmp_path):
    (tmp_path / NAME).write_bytes(b"no archive")
    return command(convert.main, f"webdataset:{tmp_path / NAME}", tmp_path / "x.beton")


def converted(tmp_path):
    source, dest = folder_of(tmp_path, jpeg())
    forked(command(convert.main, source, dest))
    return dest


def class_of_a_beton(tmp_path):
    """`--verify` finds a damaged image of the class."""
    dest = converted(tmp_path)
    data = bytearray(dest.read_bytes())
    data[data.index(b"JFIF")] ^= 1
    dest.write_bytes(data)
    return command(convert.main, "--verify", dest)


def classes_of_two_betons(tmp_path):
    dest = converted(tmp_path)
    reseal(tmp_path / "x.beton.json", class_names=[f"{NAME}2"])
    return lambda: run(lambda: check_class_names("one", [NAME], str(dest), [f"{NAME}2"]))


def sidecar(tmp_path):
    dest = converted(tmp_path)
    options = json.loads((tmp_path / "x.beton.json").read_text())["options"]
    reseal(tmp_path / "x.beton.json", options={**options, "pillow": NAME})
    return command(convert.main, "--verify", dest, "--against", tmp_path / "images")


def saved(tmp_path, **fields):
    torch.save({"model": {"head.weight": torch.zeros(4, 2)}, **fields}, tmp_path / "c.pt")
    return tmp_path / "c.pt"


def recipe_in_a_checkpoint(tmp_path):
    path = saved(tmp_path, recipe={"name": "deit_tiny", UTF8: {}})
    val = image_folder(tmp_path / "val", [jpeg()], 1)
    forked(command(convert.main, val, tmp_path / "val.beton"))
    return command(evaluate.main, path, tmp_path / "val.beton", "--device", "cpu")


def field_of_a_checkpoint(tmp_path):
    return lambda: run(lambda: describe({"class_names": [], "img_size": UTF8}, "c.pt"))


def teach(name, path):
    cfg = TeacherConfig(name=name, checkpoint=path)
    return lambda: run(lambda: Teacher(cfg, IMAGENET_MEAN, IMAGENET_STD, 32, 4))


def arch_of_a_teacher(tmp_path):
    return teach("resnet10t", saved(tmp_path, arch=UTF8))


def name_of_a_teacher(tmp_path):
    return teach(UTF8, saved(tmp_path))


def path_of_a_checkpoint(tmp_path):
    return teach("resnet10t", saved(tmp_path).rename(tmp_path / NAME))


def labels(tmp_path, **fields):
    described = {"key": {}, "teacher": "0", "teacher_name": "x", "class_names": None, "num_classes": 4, "topk": 0}
    index = {"format": "fastdeit-labels", "version": 1, "epochs": {}, **described, **fields}
    (tmp_path / "labels.json").write_text(json.dumps(index))
    return LabelCache(tmp_path)


def key_of_labels(tmp_path):
    cache = labels(tmp_path, key={NAME: 1})
    return lambda: run(lambda: cache.check({}))


def teacher_of_labels(tmp_path):
    sentence = _labels_sentence(labels(tmp_path, teacher_name=NAME))
    log = open_log(tmp_path)
    return lambda: (log.say(sentence), log.warn(sentence))


def recipe_file(tmp_path, **values):
    (tmp_path / "r.json").write_text(json.dumps(values))
    return command(train.main, "deit_tiny", "--config", tmp_path / "r.json")


def name_of_a_recipe(tmp_path):
    return recipe_file(tmp_path, name=NAME)


def value_of_a_recipe(tmp_path):
    """The parser of the command line prints the error itself."""
    return recipe_file(tmp_path, data={"loader": NO_LINES.replace("\udc80", "")})


def field_of_a_recipe(tmp_path):
    return recipe_file(tmp_path, data={NAME: 1})


def part_of_the_machine(tmp_path):
    doctor.CHECKS = [lambda: Check("x", "ok", NAME)]
    return partial(doctor.main, [])


def results_of_a_benchmark(tmp_path):
    from benchmarks import tables

    verdict = {"interval": [0, 0], "slope": 0, "growth": 0, "reasons": []}
    environment = {"cpu": NAME, "cores": 2, "gpu": None, "date": "2026", "commit": "0", "command": NAME}
    versions = dict.fromkeys(("torch", "timm", "triton"), NAME)
    figures = {"loader": NAME, "minutes": 1, "batches": 1, "epochs": 1, "peak_memory_mib": 1, "passed": True}
    record = {"benchmark": "soak", "verdict": verdict, "environment": {**environment, "versions": versions}, **figures}
    (tmp_path / "soak.jsonl").write_text(json.dumps(record) + "\n")
    return partial(tables.main, ["--results", str(tmp_path)])


def bug(tmp_path):
    """A traceback."""

    def fail():
        raise ValueError(NO_LINES)

    return lambda: run(fail)


CASES = [
    empty_class, left_out, tar_member, parquet_column, archive_name, class_of_a_beton, classes_of_two_betons, sidecar,
    recipe_in_a_checkpoint, field_of_a_checkpoint, arch_of_a_teacher, name_of_a_teacher, path_of_a_checkpoint,
    key_of_labels, teacher_of_labels, name_of_a_recipe, value_of_a_recipe, field_of_a_recipe, part_of_the_machine,
    results_of_a_benchmark, bug,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_name_is_only_text(tmp_path, case):
    _, said, _ = forked(case(tmp_path))
    on_terminal(said)


def test_every_stream_of_a_process(tmp_path):
    """Warnings, other libraries' messages, bars and tracebacks of a command, whatever the terminal's encoding."""
    script = tmp_path / "script.py"
    script.write_text(
        "import logging, sys, warnings\n"
        "from fastdeit.cli import run\n"
        "from tqdm import tqdm\n"
        f"NAME = {NO_LINES!r}\n"
        "def main():\n"
        "    print(NAME)\n"
        f"    warnings.warn({NAME!r})\n"
        "    logging.getLogger('x').warning(NAME)\n"
        "    tqdm(desc=NAME, total=2, file=sys.stderr).update()\n"
        "    raise ValueError(NAME)\n"
        "run(main)\n"
    )
    done = run_python(script, env={"PYTHONIOENCODING": "utf-8", "PYTHONPATH": ":".join(sys.path)}, status=1)
    on_terminal(done.stdout)
    on_terminal(done.stderr)
    assert done.stderr.count(GOOD) >= 4
    done = run_python(script, env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)}, status=1)
    assert r"caf\xe9 \u65e5" in done.stdout
    assert not ACTED_ON.search(done.stdout + done.stderr)


def test_the_log_holds_the_name_and_prints_it_escaped(tmp_path, capsys):
    with run_log(tmp_path) as log:
        log.warn(NAME)
    on_terminal(capsys.readouterr().out)
    line = (tmp_path / "log.jsonl").read_text()
    assert line.isascii()
    assert json.loads(line)["text"] == NAME


def test_a_colour_reset_passes_only_on_its_own():
    """colorama writes it when a program ends; within a name it is escaped."""
    stream = io.StringIO()
    for text in ("\x1b[0m", "name\x1b[0m"):
        Escaping(stream).write(text)
    assert stream.getvalue() == "\x1b[0mname\\x1b[0m"


def test_readable_names_stay():
    latin = ["Ångström", "n01440764 tench, Tinca tinca", "a\\b"]
    for name in (GOOD + JOINED, "العربية", "हिन्दी", "全角\u3000空白", *latin):
        assert printable(name) == name
