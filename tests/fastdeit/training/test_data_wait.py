"""A process that waits for data is named, with its machine, cores and file system."""

import re
import sys
import time
from pathlib import Path

import pytest
import torch

from fastdeit.distributed import World
from fastdeit.pipelines import machine
from fastdeit.pipelines.loaders.pillow import TorchLoader
from fastdeit.pipelines.machine import file_system
from fastdeit.training import data_wait
from fastdeit.training.data_wait import DataWait, Wait
from runs import train
from system import run

ALONE = World(0, 1, 1, torch.device("cpu"))


@pytest.mark.parametrize("path", ["/proc", "/dev/shm", "/", "."])
def test_the_file_system_is_the_one_that_findmnt_names(path):
    mounts = run("findmnt", "-n", "-o", "FSTYPE,SOURCE", "-T", Path(path).resolve(), check=True).stdout.splitlines()
    kind, source = mounts[-1].split()
    assert file_system(Path(path)) == f"{kind} ({source})"


def test_a_mount_with_a_space_in_its_name_is_found(tmp_path, monkeypatch):
    data, table = tmp_path / "my data", tmp_path / "mountinfo"
    mount = f"{tmp_path}/my\\040data"
    table.write_text(
        "22 1 254:0 / / rw - ext4 /dev/root rw\n"
        f"30 22 0:40 / {mount} rw,relatime shared:1 - nfs4 server:/a\\040b rw\n"
        f"31 22 0:41 / {mount}x rw - tmpfs tmpfs rw\n"
    )
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, **how: read(table if "mountinfo" in str(self) else self, **how))
    assert machine.file_system(data / "train.beton") == "nfs4 (server:/a b)"
    assert machine.file_system(tmp_path / "my datum") == "ext4 (/dev/root)"


def wait(share=0.5, seconds=60.0, busy=0.97, read=3.2):
    return Wait(share, seconds, busy, read, "node7", "nfs4 (server:/data)")


def test_the_process_that_waits_is_named_once(tmp_path):
    waits = DataWait(ALONE, tmp_path / "train.beton")
    assert waits.warnings([wait(share=0.1), wait(seconds=5)]) == []
    (sentence,) = waits.warnings([wait(share=0.01), wait()])
    assert re.fullmatch(
        r"process 1 \(node7\) waited for data during 50% of the epoch, and all others with it\. It kept its cores 97% "
        r"busy and read 3 MB/s from disk; .*/train\.beton is on nfs4 \(server:/data\) there: more cores, or smaller "
        r"images \(fastdeit-convert --max-side\), would help",
        sentence,
    )
    assert waits.warnings([wait(share=0.01), wait()]) == []
    (sentence,) = waits.warnings([wait(busy=0.1, read=None), wait()])
    assert "10% busy; " in sentence
    assert sentence.endswith("a faster disk would help, such as a local one for --data.cache_dir")


def slow_down(monkeypatch, seconds, images=sys.maxsize):
    """Decoding takes so many seconds longer for the first `images`; returns a list with an item for each of them."""
    decode, waited = TorchLoader.decode_image, []

    def slowly(self, *args, **kwargs):
        if len(waited) < images:
            waited.append(True)
            time.sleep(seconds)
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(TorchLoader, "decode_image", slowly)
    return waited


def test_a_run_with_a_slow_loader_says_so(tiny, monkeypatch, events):
    slow_down(monkeypatch, 0.1)
    monkeypatch.setattr(data_wait, "_SECONDS", 0.2)
    recipe = tiny(run={"epochs": 2}, data={"val": None})
    train(recipe)
    each = events(recipe.run.output, "waits")
    assert [event["epoch"] for event in each] == [0, 1]
    (last,) = each[-1]["processes"]
    assert last["share"] > 0.3
    assert last["busy"] < 0.8
    warnings = [event["text"] for event in events(recipe.run.output, "warning") if "waited for data" in event["text"]]
    assert len(warnings) == 1
    assert "a faster disk would help" in warnings[0]


def test_the_wait_for_the_first_batch_blames_no_disk(tiny, monkeypatch, events):
    """It includes compilation, which no faster disk shortens."""
    waited = slow_down(monkeypatch, 2, images=1)
    monkeypatch.setattr(data_wait, "_SECONDS", 1.0)
    recipe = tiny(run={"epochs": 1}, data={"val": None})
    train(recipe)
    assert waited
    assert not any("waited for data" in event["text"] for event in events(recipe.run.output, "warning"))
