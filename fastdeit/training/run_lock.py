"""One writer for each run folder: two runs in one folder would mix their logs and prune each other's checkpoints."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fastdeit.pipelines.errors import UserError, naming
from fastdeit.pipelines.formats.files import is_at, open_regular
from fastdeit.pipelines.locks import lock
from fastdeit.pipelines.parsing import parse_json, read_json

NAME = "run.lock"
_LINE = b'{"event": '  # start of every line in a run's log
HEARTBEAT = 10.0  # seconds between two touches of the file by its holder


class RunLock:
    """Holds a run's folder for this process until `close`, or until the process ends in whatever way.

    notes  sentences for the run's opening lines: a lock that was taken over, a file system without locks

    It uses flock, which the system releases when the process ends. The file names its holder. On a shared file system
    flock may hold on one machine only, or not at all, so the holder also touches the file every `HEARTBEAT` seconds. A
    lock from another machine, or without flock, counts as held while those touches go on. Raises UserError, naming
    host and process, if another run holds the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.notes = folder / NAME, list[str]()
        self._ended = threading.Event()
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
            try:
                self._take()
                # The former holder may have removed the file between the opening and the locking.
                if is_at(self._file, self.path):
                    break
            except BaseException:
                self._file.close()
                raise
            self._file.close()
        self._beat = threading.Thread(target=self._touch, name="fastdeit-run-lock", daemon=True)
        self._beat.start()

    def _take(self) -> None:
        try:
            locked = lock(self._file)
        except BlockingIOError as error:
            raise UserError(f"{self._in_use(self._holder())}: wait for it or stop it, or {_ELSEWHERE}") from error
        left = self._holder()
        if not locked:
            self.notes.append(
                f"{self.path}: this file system has no locks, so a second run that starts here within "
                f"{HEARTBEAT:.0f} seconds may go unnoticed"
            )
        if left and (not locked or left.get("host") != socket.gethostname()):
            print(
                f"{self.path} names {_process(left)}: waiting {2.5 * HEARTBEAT:.0f} s to see whether it still runs",
                file=sys.stderr,
                flush=True,
            )
            if self._touched():
                raise UserError(
                    f"{self._in_use(left)}, which still touches {NAME}, though this machine does not see its lock: "
                    f"stop it there, or {_ELSEWHERE}"
                )
            self.notes.append(f"{self.path} was left by {_process(left)}, which no longer touches it: taken over")
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        with naming(self.path):
            self._file.truncate(0)
            self._file.write(json.dumps(me).encode() + b"\n")

    def _holder(self) -> dict[str, Any]:
        """The holder that the file names; empty if it names none."""
        self._file.seek(0)
        try:
            holder = parse_json(self._file.read(4096))
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def _in_use(self, holder: dict[str, Any]) -> str:
        return f"{self.path.parent} is in use by {_process(holder)}"

    def _touched(self) -> bool:
        """Whether a holder touches the file within two and a half heartbeats.

        Each check opens the file anew, since NFS asks the server only then.
        """
        before, end = self._changed(), time.monotonic() + 2.5 * HEARTBEAT
        while time.monotonic() < end:
            time.sleep(HEARTBEAT / 10)
            if self._changed() != before:
                return True
        return False

    def _changed(self) -> int:
        with open(self.path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns

    def _touch(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # a file server that is down for a while must not end a run
                os.utime(self._file.fileno())

    def lost(self) -> bool:
        """Whether somebody has removed the folder, or the file in it, so that another run could take it."""
        try:
            return not is_at(self._file, self.path)
        except OSError:  # a file server that is down for a while
            return False

    def close(self) -> None:
        """Let the next run have the folder; may be called twice. A run that wrote nothing leaves no folder either."""
        if self._file.closed:
            return
        self._ended.set()
        self._beat.join()
        with contextlib.suppress(OSError):
            if is_at(self._file, self.path):
                self.path.unlink()  # while it is locked, so that nobody else takes it up
        self._file.close()
        with contextlib.suppress(OSError):  # of a folder that is not empty
            for folder in self._made:
                folder.rmdir()


_ELSEWHERE = "give another --run.output"


def _process(holder: dict[str, Any]) -> str:
    if not holder:
        return "another run"
    return f"process {holder.get('pid')} on host {holder.get('host')} (since {holder.get('since')})"


def take_folder(folder: Path) -> RunLock:
    """The lock of a folder in which a run starts.

    Raises UserError if another run holds it, or if it has a recipe or a log that no run wrote: the run would write into
    them. A folder with checkpoints is a run's, whatever has become of its other files.
    """
    _check_files(folder)
    return RunLock(folder)


def _check_files(folder: Path) -> None:
    if any(folder.glob("checkpoints/checkpoint-*.pt")):
        return
    for path, is_ours in ((folder / "recipe.json", _is_recipe), (folder / "log.jsonl", _is_log)):
        if path.is_file() and not is_ours(path):
            raise UserError(f"{path} was not written by a run: move it, or {_ELSEWHERE}")


def _is_recipe(path: Path) -> bool:
    try:
        stored = read_json(path)
    except ValueError:
        return False
    sections = ("model", "data", "run")
    return isinstance(stored, dict) and all(isinstance(stored.get(section), dict) for section in sections)


def _is_log(path: Path) -> bool:
    with open(open_regular(path), "rb") as file:
        head = file.read(len(_LINE))
    # A full disk may have cut the first line short, and a crash of the machine may have left zeros.
    return _LINE.startswith(head) or head.startswith(b"\0")
