"""One run for each folder; the judge is the operating system, which drops a lock with its process."""

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from fastdeit.pipelines.errors import UserError
from fastdeit.training import run_lock
from fastdeit.training.run_lock import NAME, RunLock, take_folder
from refusals import refused
from system import refusing, wait_for

HOLD = """
import sys, time, pathlib
from fastdeit.training.run_lock import RunLock
lock = RunLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def holder(folder):
    """A process that holds the lock of `folder`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_by_host_and_process_until_the_first_is_dead(tmp_path):
    process = holder(tmp_path)
    with pytest.raises(UserError) as caught:
        RunLock(tmp_path)
    assert f"{tmp_path} is in use by process {process.pid} on host {socket.gethostname()}" in str(caught.value)
    assert "--run.output" in str(caught.value)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lock = RunLock(tmp_path)
    assert lock.notes == []
    lock.close()
    lock.close()
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize(
    "text", ["", "abc", "abc\n", '{"x": 1}', "[]", '{"model": 1, "data": {}, "run": {}}', "[" * 10**5]
)
def test_a_folder_with_somebodys_recipe_is_refused(tmp_path, text):
    (tmp_path / "recipe.json").write_text(text)
    refused(r"recipe\.json was not written by a run: move it, or give another --run\.output", take_folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]
    assert (tmp_path / "recipe.json").read_text() == text


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("abc", False), ("abc\n", False), ('{"loss": 1}\n', False), ("[" * 10**5, False),
        ("", True), ('{"event": "start", "time": 1.0}\n', True), ('{"ev', True), ("\0" * 4096, True),
    ],
)  # fmt: skip
def test_a_folder_with_somebodys_log_is_refused(tmp_path, text, ours):
    """A log of ours may have been cut short, or filled with zeros by a crash of the machine."""
    (tmp_path / "log.jsonl").write_text(text)
    if ours:
        take_folder(tmp_path).close()
    else:
        refused(r"log\.jsonl was not written by a run", take_folder, tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == text
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "checkpoint-000000005.pt").touch()
    take_folder(tmp_path).close()  # a run's folder, whatever became of its log


def test_a_lock_that_only_another_machine_sees_counts_while_it_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT", 0.2)
    path = tmp_path / NAME
    path.write_text('{"host": "node17", "pid": 4711, "since": "then"}')
    ended = threading.Event()

    def touch():
        while not ended.wait(0.1):
            os.utime(path)

    other = threading.Thread(target=touch)
    other.start()
    try:
        refused(r"in use by process 4711 on host node17 .* does not see its lock", RunLock, tmp_path)
    finally:
        ended.set()
        other.join()
    lock = RunLock(tmp_path)
    assert "left by process 4711 on host node17 (since then), which no longer touches it" in lock.notes[0]
    before = path.stat().st_mtime_ns
    time.sleep(0.5)
    assert path.stat().st_mtime_ns > before  # this one touches it in turn
    lock.close()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", refusing(errno.ENOLCK))
    monkeypatch.setattr(run_lock, "HEARTBEAT", 0.2)
    first = RunLock(tmp_path)
    assert "this file system has no locks" in first.notes[0]
    refused(rf"process {os.getpid()} on host", RunLock, tmp_path)
    first.close()
    RunLock(tmp_path).close()


def test_a_full_disk_is_named(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            RunLock(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.filename == str(tmp_path / "run" / NAME)


def test_a_file_of_nonsense_is_no_holder(tmp_path):
    for text in (b"\x00\xff", b"[1]", b"{", b'{"pid": 3}'):
        (tmp_path / NAME).write_bytes(text)
        if text != b'{"pid": 3}':
            RunLock(tmp_path).close()


@pytest.mark.slow
def test_two_commands_with_one_output(tiny, launch):
    recipe = tiny(run={"epochs": 500})
    first = launch(recipe, wait=False)
    try:
        log = recipe.run.output / "log.jsonl"
        wait_for(lambda: log.exists() and '"train"' in log.read_text(), first)
        second = launch(recipe, status=2)
        assert f"in use by process {first.pid} on host {socket.gethostname()}" in second.err
        assert log.read_text().count('"event": "start"') == 1
    finally:
        first.kill()
        first.wait()
