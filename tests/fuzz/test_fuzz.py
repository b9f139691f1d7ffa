"""A small campaign of damaged images and containers passes, and faults planted in the code are found.

FASTDEIT_FUZZ multiplies the size of the campaign; 65 is 10,000 images.
"""

import json
import os
import signal
import time

import pytest

from benchmarks.record import RESULTS
from system import run_python
from tests.fuzz.containers import OUTPUTS, SOURCES
from tests.fuzz.images import KINDS
from tests.fuzz.process import in_child

pytest.importorskip("pyarrow")

FUZZ = int(os.environ.get("FASTDEIT_FUZZ", "1"))


def run(*words, cwd=RESULTS.parents[1]):
    """Python in a process of its own, since it forks, which the threads of other tests forbid."""
    environment = {**os.environ, "PYTHONPATH": str(RESULTS.parents[1])}
    return run_python(*words, cwd=cwd, env=environment, status=0)


@pytest.mark.slow
def test_a_small_campaign(tmp_path):
    images, containers = len(KINDS) * (1 + 3 * FUZZ), (len(SOURCES) + len(OUTPUTS)) * 2 * FUZZ
    results = tmp_path / "fuzz.jsonl"
    sizes = ("--images", str(images), "--containers", str(containers))
    run("-m", "tests.fuzz", *sizes, "--results", str(results))
    record = json.loads(results.read_text())
    assert record["passed"]
    counts = record["counts"]
    assert {kind for kind, count in counts.items() if count} == {*KINDS, *SOURCES, *OUTPUTS}
    # Every image once raw and once as it is, every container once.
    assert sum(sum(counts[kind].values()) for kind in KINDS) == 2 * images
    assert sum(sum(counts[kind].values()) for kind in (*SOURCES, *OUTPUTS)) == containers
    for what in ("accepted as auto", "accepted as raw", "rejected as auto", "rejected as raw"):
        assert sum(counts[kind].get(what, 0) for kind in KINDS) > images / 10


PLANTED = """
import os, signal, tempfile
from contextlib import closing
from pathlib import Path
from unittest import mock
from tests.fuzz import cases
from tests.fuzz.cases import damaged_output, damaged_source, image_batch, outputs_to_damage
from fastdeit.pipelines.conversion import job, encode, verify
from fastdeit.pipelines.formats.dataset import open_dataset
from fastdeit.pipelines.loaders.pillow import TorchLoader
from fastdeit.pipelines.sources.webdataset import WebDataset

decode, to_rgb, write, read = TorchLoader.decode_image, encode._to_rgb, job._write_rejects, WebDataset.read
pristine = outputs_to_damage(Path("pristine"))
images = image_batch, (range(95), ["torch"], 0)
archive = damaged_source, ("webdataset shards", 0, ["torch"])
beton = damaged_output, ("beton of pixels", 1, ["torch"], pristine)
with closing(open_dataset(pristine["beton", "raw"] / "x.beton")) as dataset:
    pixels = dataset.read(5).tobytes()

def one_bit(data, rng):
    at = data.index(pixels)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

def brighter(self, index, out, region=None):
    decode(self, index, out)
    out += 1
    return True

for name, where, attribute, fault, (case, arguments) in (
    ("nothing", TorchLoader, "decode_image", decode, images),
    ("nothing", TorchLoader, "decode_image", decode, archive),
    ("nothing", TorchLoader, "decode_image", decode, beton),
    ("pixels", TorchLoader, "decode_image", brighter, images),
    ("crash", TorchLoader, "decode_image", lambda *unused: os.kill(os.getpid(), signal.SIGSEGV), archive),
    ("colours", encode, "_to_rgb", lambda image: to_rgb(image.rotate(180)), images),
    ("reject", job, "_write_rejects", lambda path, rejects: write(path, rejects[1:]), images),
    ("label", WebDataset, "read", lambda self, i: (read(self, i)[0], 0, read(self, i)[2]), archive),
    ("flip", verify, "_check_samples", lambda *unused: None, beton),
):
    folder = Path(tempfile.mkdtemp())
    with mock.patch.object(cases, "damage", one_bit), mock.patch.object(where, attribute, fault):
        print("==", name, *case(folder, 0, *arguments).problems)
"""


FOUND = {
    "pixels": "not the right pixels",
    "crash": "exit status -11",
    "colours": "levels from Pillow's",
    "reject": "were not rejected",
    "label": "nothing that its source holds",
    "flip": "damaged, and --verify says",
}


@pytest.mark.slow
def test_planted_faults_are_found(tmp_path):
    out = run("-c", PLANTED, cwd=tmp_path)
    told = [block.strip() for block in out.stdout.split("== ")[1:]]
    assert told[:3] == ["nothing"] * 3
    for found, (name, what) in zip(told[3:], FOUND.items(), strict=True):
        assert found.startswith(name)
        assert what in found


def bomb():
    bytearray(1 << 30)


def leave():
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("work", "status", "broke"),
    [
        (lambda: print("said"), 0, False),
        (lambda: 5, 5, False),
        (leave, 3, False),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), -signal.SIGTERM, True),
        (lambda: time.sleep(60), -signal.SIGKILL, True),
        (bomb, 70, True),
        (lambda: 1 // 0, 70, True),
    ],
)
def test_how_a_child_ends(tmp_path, work, status, broke):
    ended = in_child(work, tmp_path / "log", seconds=1.5, memory=1 << 28)
    assert (ended.status, ended.broke) == (status, broke)
    assert ended.hung == (status == -signal.SIGKILL)
    assert ("said" in ended.output) == (status == 0)
    assert ended.seconds < 30
