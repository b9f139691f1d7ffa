"""Watches the processes of a run: if one is lost, the others name it and end, instead of waiting for it for ever."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

from fastdeit.joining import Meeting, Peer
from fastdeit.signals import end_at_once

BEAT = 2.0  # seconds between two heartbeats
SILENT = 120.0  # seconds without a heartbeat after which a process counts as lost
_LEFT, _FELL = "left", "fell"  # the last heartbeat of a process that ends by itself, or because of another


class Attendance:
    """Finds the lost process from the heartbeats of all.

    A heartbeat holds the number of collective operations that the process has begun. A process is lost if it sends no
    heartbeat for `silent` seconds. It is also lost if for `patience` seconds it has begun fewer operations than another
    process, and no further one: the others are waiting for it.
    """

    def __init__(self, peers: tuple[Peer, ...], *, silent: float, patience: float) -> None:
        self._peers, self._silent, self._patience = peers, silent, patience
        self._beats: dict[int, tuple[str, int]] = {}  # the last heartbeat of each rank: text, operations
        self._unheard = dict.fromkeys(range(len(peers)), 0.0)  # seconds
        self._waited_for = dict.fromkeys(range(len(peers)), 0.0)  # seconds

    def look(self, beats: dict[int, str], seconds: float) -> tuple[Peer, str] | None:
        """Record `beats`, read `seconds` after those before; returns the first lost process and the reason, or None.

        A heartbeat is "BEAT OPERATIONS", or one word from a process that has ended. Ranks that are not in `beats` are
        not judged.
        """
        present = {rank: text for rank, text in beats.items() if text not in (_LEFT, _FELL)}
        begun = {rank: int(text.split()[1]) for rank, text in present.items()}
        for rank, text in present.items():
            before = self._beats.get(rank, ("", -1))
            waits = begun[rank] == before[1] and begun[rank] < max(begun.values())
            self._unheard[rank] = self._unheard[rank] + seconds if text == before[0] else 0.0
            self._waited_for[rank] = self._waited_for[rank] + seconds if waits else 0.0
            self._beats[rank] = text, begun[rank]
            if self._unheard[rank] >= self._silent:
                return self._peers[rank], (
                    f"has sent no heartbeat for {self._silent:.0f} seconds: it is stopped, or its machine or network "
                    f"is down"
                )
            if self._waited_for[rank] >= self._patience and not self._unheard[rank]:  # else it may be stopped
                return self._peers[rank], (
                    f"has kept the others waiting for {self._patience / 60:g} minutes: it is hanging, and "
                    f"prints the stacks of its threads. If it is only slow, set a larger --run.timeout_minutes"
                )
        return None


class Watch:
    """Ends this process, with a sentence that names the culprit, once a process of the run is lost.

    A thread does this, because the main thread is blocked in a collective operation that the lost process does not
    join. The main process watches all others; these watch the main process. The exit status is `REQUEUE`, because the
    run can continue from its last checkpoint.

    minutes  how long a process may keep the others waiting
    begun    counts the collective operations that this process has begun
    """

    def __init__(self, meeting: Meeting, rank: int, minutes: float, begun: Callable[[], int]) -> None:
        self._peers, self._rank, self._begun = meeting.peers, rank, begun
        self._shared = meeting.store
        self._store = meeting.store.clone()  # the main thread's client may be busy
        self._silent = min(SILENT, 60 * minutes)
        self._every = min(BEAT, self._silent / 12)
        self._attendance = Attendance(meeting.peers, silent=self._silent, patience=60 * minutes)
        self._beat, self._rounds, self._unborn = 0, 0, set(range(len(meeting.peers)))
        self._ended = threading.Event()
        self._send()
        self._thread = threading.Thread(target=self._run, name="fastdeit-watch", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="fastdeit-watch-guard", daemon=True).start()

    def close(self, *, in_order: bool, fell: bool = False) -> None:
        """Stop watching. If the run ended normally, the main process waits for the others, which may need its store.

        in_order  the run ended normally
        fell      this process ends because another is lost
        """
        self._ended.set()
        self._thread.join(self._silent)
        if self._thread.is_alive():  # the store does not answer
            return
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self._store.set(_key(self._rank), _FELL if fell else _LEFT)
            end, others = time.monotonic() + self._silent, set(self._everybody) - {0}
            while in_order and self._rank == 0 and time.monotonic() < end:
                if all(text in (_LEFT, _FELL) for text in self._read(others).values()):
                    break
                time.sleep(0.05)

    def gone(self) -> list[Peer]:
        """The processes that are dead, or whose heartbeat stops for two and a half intervals.

        Call it after a collective operation has failed: the process that died sends no heartbeat, those that saw it die
        do. For processes on this machine, the operating system knows at once.
        """
        with contextlib.suppress(RuntimeError):
            end, still = time.monotonic() + 2.5 * self._every, self._read(set(self._everybody) - {self._rank})
            while time.monotonic() < end:
                time.sleep(0.1)
                here = self._peers[self._rank].host
                sure = [self._peers[rank] for rank, text in sorted(still.items()) if text != _FELL]
                dead = [peer for peer in sure if peer.host == here and _is_dead(peer.pid)]
                if dead:
                    return dead
                now = self._read(still)
                still = {rank: text for rank, text in still.items() if now[rank] in (text, _LEFT)}
            return [self._peers[rank] for rank, text in sorted(still.items()) if text != _FELL]
        return []

    def _run(self) -> None:
        before, failing = time.monotonic(), 0.0
        while not self._ended.wait(self._every):
            self._rounds += 1
            now = time.monotonic()
            # After a stop of this process itself, do not count time in which it could not read heartbeats.
            seconds, before = min(now - before, 2 * self._every), now
            try:
                self._send()
                if self._store.check(["lost"]):
                    rank, reason = self._store.get("lost").decode().split(" ", 1)
                    self._store.set(_key(self._rank), _FELL)
                    self._end(self._peers[int(rank)], reason)
                lost = self._attendance.look(self._read(self._everybody if self._rank == 0 else [0]), seconds)
                failing = 0.0
            except RuntimeError as error:
                failing += seconds
                if failing >= self._silent / 4:
                    self._leave_store(str(error).splitlines()[0])
                with contextlib.suppress(RuntimeError):
                    self._store = self._shared.clone()
            else:
                if lost is not None:
                    self._tell(*lost)
                    self._end(*lost)

    def _guard(self) -> None:
        """End this process if the store stops answering, as on a machine that is cut off; `_run` is blocked then."""
        before, rounds, blocked = time.monotonic(), 0, 0.0
        while not self._ended.wait(self._every):
            now = time.monotonic()
            blocked = blocked + min(now - before, 2 * self._every) if self._rounds == rounds else 0.0
            before, rounds = now, self._rounds
            if blocked >= self._silent:
                self._leave_store(f"no answer for {self._silent:.0f} seconds")

    def _leave_store(self, reason: str) -> None:
        end_at_once(
            f"{self._peers[self._rank]} cannot reach the run's store ({reason}): the process that serves it "
            f"(torchrun or rank 0) has ended, or the network is down"
        )

    def _tell(self, peer: Peer, reason: str) -> None:
        """Tell the other processes, and wait until they have read it: this process may serve the store."""
        with contextlib.suppress(RuntimeError):
            self._store.set("lost", f"{peer.rank} {reason}")
            end, others = time.monotonic() + 2.5 * self._every, set(self._everybody) - {self._rank}
            while time.monotonic() < end and any(text != _FELL for text in self._read(others).values()):
                time.sleep(0.1)

    def _send(self) -> None:
        self._beat += 1
        self._store.set(_key(self._rank), f"{self._beat} {self._begun()}")

    @property
    def _everybody(self) -> range:
        return range(len(self._peers))

    def _read(self, of: Iterable[int]) -> dict[int, str]:
        """The last heartbeats; "0 0" for a process that has sent none yet."""
        of = list(of)
        self._unborn -= {rank for rank in self._unborn.intersection(of) if self._store.check([_key(rank)])}
        born = [rank for rank in of if rank not in self._unborn]
        values = self._store.multi_get([_key(rank) for rank in born]) if born else []
        return dict.fromkeys(of, "0 0") | {rank: value.decode() for rank, value in zip(born, values, strict=True)}

    def _end(self, peer: Peer, reason: str) -> NoReturn:
        if peer.rank == self._rank:
            with contextlib.suppress(OSError):
                faulthandler.dump_traceback(2)
        end_at_once(f"{peer} {reason}")


def _is_dead(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's
        pass
    return False


def _key(rank: int) -> str:
    return f"beat/{rank}"
