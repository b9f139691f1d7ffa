"""A process that is stopped, or that the others wait for, is named; one that is only slow is not."""

import contextlib
import os
import socket
import subprocess
import threading

import pytest
import torch.distributed as dist

from fastdeit import watch
from fastdeit.joining import Meeting, Peer
from fastdeit.watch import Attendance, Watch
from system import wait_for

PEERS = tuple(Peer(rank, f"host{rank}", 100 + rank) for rank in range(3))


@pytest.fixture
def attendance():
    return Attendance(PEERS, silent=20, patience=60)


def looks(attendance, signs, seconds=5):
    """The number of the look at which somebody is lost, who, and why; None if nobody is."""
    for number, beats in enumerate(signs):
        lost = attendance.look(dict(enumerate(beats)), seconds)
        if lost is not None:
            return number, *lost
    return None


def test_a_process_that_is_stopped_is_lost_after_its_silence(attendance):
    signs = [(f"{n} {n}", f"{min(n, 10)} {min(n, 10)}", f"{n} {n}") for n in range(100)]
    number, peer, reason = looks(attendance, signs)
    assert (number, peer) == (14, PEERS[1])  # its last heartbeat is number 10; then 4 looks, 5 seconds apart
    assert "has sent no heartbeat for 20 seconds" in reason


def test_a_process_that_hangs_is_lost_after_the_patience(attendance):
    """It sends heartbeats, but has begun fewer operations than those that wait for it."""
    signs = [(f"{n} {min(n, 11)}", f"{n} {min(n, 10)}", f"{n} {min(n, 11)}") for n in range(100)]
    number, peer, reason = looks(attendance, signs)
    assert (number, peer) == (11 + 12 - 1, PEERS[1])
    assert "kept the others waiting for 1 minutes" in reason
    assert "--run.timeout_minutes" in reason


def test_processes_that_all_work_long_without_an_operation_are_not_lost(attendance):
    assert looks(attendance, [(f"{n} 7",) * 3 for n in range(1000)]) is None


def test_a_slow_process_is_not_lost_while_it_comes_along(attendance):
    signs = [(f"{n} {n + 9}", f"{n} {n // 9}", f"{n} {n + 9}") for n in range(1000)]
    assert looks(attendance, signs) is None


def test_a_process_that_has_ended_is_not_lost(attendance):
    signs = [(f"{n} 5", "left" if n > 3 else f"{n} 4", "fell") for n in range(100)]
    assert looks(attendance, signs) is None


def test_a_process_that_never_gave_a_sign_is_lost(attendance):
    assert looks(attendance, [(f"{n} 0", f"{n} 0", "0 0") for n in range(100)])[1] == PEERS[2]


@pytest.fixture
def watching(monkeypatch):
    """Function: a watch of rank `rank`, whose processes share a store; the sentences with which it ended a process."""
    store, ended = dist.HashStore(), []

    class Shared:  # a HashStore cannot be cloned
        def __getattr__(self, name):
            return getattr(store, name)

        def clone(self):
            return self

    monkeypatch.setattr(watch, "end_at_once", lambda reason: ended.append(reason))
    monkeypatch.setattr(watch, "SILENT", 0.6)
    with contextlib.ExitStack() as stack:

        def start(rank, begun, minutes=1.0, answers=None):
            shared = Shared()
            watched = Watch(Meeting(shared, PEERS[:2]), rank, minutes, begun)
            if answers is not None:
                shared.set = lambda *_: answers.wait()
            stack.callback(watched.close, in_order=False)
            return watched

        yield start, ended, store


def test_both_processes_learn_who_hangs(watching):
    start, ended, _ = watching
    for rank, begun in enumerate((4, 3)):
        start(rank, lambda begun=begun: begun, minutes=0.02)
    wait_for(lambda: len(ended) >= 2)
    assert all(sentence.startswith("rank 1 (process 101 on host host1) has kept") for sentence in ended)


def test_a_process_without_a_watch_is_named(watching):
    start, ended, _ = watching
    start(0, lambda: 0)
    wait_for(lambda: ended)
    assert ended[0].startswith("rank 1 (process 101 on host host1) has sent no heartbeat")


def test_who_died_is_told_from_who_saw_it(watching):
    start, _, store = watching
    zero = start(0, lambda: 0)
    store.set("beat/1", "5 5")  # it sends no more
    assert zero.gone() == [PEERS[1]]
    one = start(1, lambda: 0)
    assert zero.gone() == []
    one.close(in_order=False, fell=True)
    assert zero.gone() == []
    one.close(in_order=False)
    assert zero.gone() == [PEERS[1]]


def test_a_store_that_does_not_answer_ends_the_process(watching):
    """As on a machine that is cut off the network."""
    start, ended, _store = watching
    answers = threading.Event()
    try:
        start(1, lambda: 0, answers=answers)
        wait_for(lambda: ended)
    finally:
        answers.set()
    assert ended[0].startswith("rank 1 (process 101 on host host1) cannot reach the run's store (no answer for")


def test_a_dead_process_of_this_machine_is_known_at_once(watching, monkeypatch):
    dead = subprocess.Popen(["true"])
    dead.wait()
    peers = tuple(Peer(rank, socket.gethostname(), pid) for rank, pid in enumerate((os.getpid(), dead.pid)))
    monkeypatch.setitem(globals(), "PEERS", peers)
    start, _, _ = watching
    monkeypatch.setattr(watch, "BEAT", 0.01)
    assert start(0, lambda: 0).gone() == [peers[1]]


def test_the_main_process_waits_for_the_others_at_the_end(watching):
    start, ended, store = watching
    zero, one = start(0, lambda: 0), start(1, lambda: 0)
    one.close(in_order=True)
    zero.close(in_order=True)
    assert (store.get("beat/0"), store.get("beat/1")) == (b"left", b"left")
    assert ended == []
