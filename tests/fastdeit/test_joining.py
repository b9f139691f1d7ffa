"""Processes meet under a name of their own, whatever an earlier start left in the store, or are refused by name."""

import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from fastdeit import joining
from fastdeit.joining import meet, open_store
from fastdeit.pipelines.errors import UserError
from refusals import refused

SECONDS = 1 / 60


def together(store, *facts, minutes=1.0):
    """What `meet` returns, or the sentence it raises, for a process with each of `facts`."""

    def one(rank):
        try:
            return meet(store, rank, len(facts), facts[rank], minutes)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(one, range(len(facts))))


def test_each_start_has_keys_of_its_own_and_knows_its_processes():
    store = dist.HashStore()
    first, second = (together(store, {}, {}) for _ in range(2))
    for meetings in (first, second):
        meetings[0].store.set("address", str(id(meetings)))
        assert [meeting.store.get("address").decode() for meeting in meetings] == [str(id(meetings))] * 2
        assert meetings[0].peers == meetings[1].peers
        assert str(meetings[0].peers[1]) == f"rank 1 (process {os.getpid()} on host {socket.gethostname()})"


def test_questions_of_processes_that_died_confuse_nobody():
    """In an earlier start ranks 1 and 2 asked, and died before or after the answer."""
    store = dist.HashStore()
    for rank in (1, 2):
        store.set(f"fastdeit/asks/{rank}", "of-a-dead-process")
    store.set("fastdeit/names/of-a-dead-process", "an-earlier-start")
    meetings = together(store, {}, {}, {})
    meetings[0].store.set("key", "value")
    assert [meeting.store.get("key") for meeting in meetings] == [b"value"] * 3


def test_processes_that_are_missing_are_named_on_those_that_came():
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(meet, store, rank, 4, {}, 2 * SECONDS) for rank in (0, 2)]
        for task in tasks:
            refused(rf"ranks 1, 3 of 4 processes have not joined.*{socket.gethostname()}", task.result)


def test_without_the_main_process_the_others_say_so():
    with pytest.raises(UserError, match=rf"rank 0 has not answered rank 1 \(process {os.getpid()} on host"):
        meet(dist.HashStore(), 1, 2, {}, SECONDS / 5)


def test_what_differs_is_named_with_its_host_on_every_process():
    ours = {"--data.train": "/data/a.beton", "--run.seed": "0"}
    sentences = together(dist.HashStore(), ours, ours, {"--data.train": "/scratch/a.beton", "--run.seed": "0"})
    assert len(set(sentences)) == 1
    assert sentences[0].startswith(
        f"rank 2 (process {os.getpid()} on host {socket.gethostname()}) has --data.train /scratch/a.beton instead of "
        f"/data/a.beton on rank 0 ("
    )
    assert "same command" in sentences[0]
    assert "--run.seed" not in sentences[0]


def stranger(store, **card):
    """Have a process of another machine join as rank 1, with changes to its card."""

    def join():
        while not store.check(["fastdeit/names/strange"]):
            time.sleep(0.01)
        held = dist.PrefixStore(f"fastdeit/starts/{store.get('fastdeit/names/strange').decode()}", store)
        facts = {"fastdeit": joining.__version__, "torch": joining.torch.__version__}
        held.set("card/1", json.dumps({"host": "far", "pid": 7, "facts": facts, "clock": time.time(), **card}))

    store.set("fastdeit/asks/1", "strange")
    threading.Thread(target=join, daemon=True).start()


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(joining, "_READ", 0.1)  # the stranger does not say that it has read why
    store = dist.HashStore()
    stranger(store, facts={"fastdeit": "0.0.9", "torch": joining.torch.__version__})
    expected = rf"rank 1 \(process 7 on host far\) has fastdeit 0\.0\.9 instead of {joining.__version__} on rank 0"
    refused(expected, meet, store, 0, 2, {})


@pytest.mark.parametrize(("skew", "word"), [(90, "90 seconds ahead of"), (-3600, "3600 seconds behind"), (20, None)])
def test_a_clock_that_is_wrong_by_more_than_a_minute_is_a_warning(skew, word):
    store = dist.HashStore()
    stranger(store, clock=time.time() + skew)
    meeting = meet(store, 0, 2, {})
    assert len(meeting.warnings) == (word is not None)
    if word is not None:
        # A busy machine may read the card late.
        assert "rank 1 (process 7 on host far)" in meeting.warnings[0]
        assert word.split()[-1] in meeting.warnings[0]


def free_port():
    with socket.socket() as taken:
        taken.bind(("", 0))
        return taken.getsockname()[1]


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"rank 0 on host \S+ cannot listen on port {port} .*--rdzv-endpoint"):
            open_store(0, environ={"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


def test_why_a_start_is_refused_reaches_all_before_the_main_process_ends():
    """It serves the store: once it has ended, nobody reads anything there."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def serve():
        with pytest.raises(UserError) as caught:
            meet(open_store(0, environ=where), 0, 2, {"--run.seed": "0"})
        return str(caught.value)

    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve)
        with pytest.raises(UserError, match=r"--run\.seed 1 instead of 0") as caught:
            meet(open_store(1, environ=where), 1, 2, {"--run.seed": "1"})
        assert served.result() == str(caught.value)


def test_a_store_that_is_lost_while_processes_join_is_told():
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    served = open_store(0, environ=where)
    with ThreadPoolExecutor(1) as pool:
        joining_one = pool.submit(meet, open_store(1, environ=where), 1, 2, {})
        while not served.check(["fastdeit/asks/1"]):
            time.sleep(0.01)
        del served
        refused(r"rank 1 \(process .* has lost its connection to the store before all", joining_one.result)


def test_the_main_process_too_is_told_that_torchruns_store_is_lost():
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    served = open_store(0, environ=where)
    with ThreadPoolExecutor(1) as pool:
        client = open_store(0, environ={**where, "TORCHELASTIC_USE_AGENT_STORE": "True"})
        joining_main = pool.submit(meet, client, 0, 2, {})
        time.sleep(0.2)
        del served
        refused(r"rank 0 \(process .* lost its connection .*: torchrun has ended", joining_main.result)


def test_a_store_that_nobody_serves_is_named():
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for environ in (where, {**where, "TORCHELASTIC_USE_AGENT_STORE": "True"}):
        refused(r"rank 1 on host \S+ could not reach the store at 127\.0\.0\.1:", open_store, 1, SECONDS, environ)


def test_variables_that_are_missing_are_named():
    refused(r"not MASTER_ADDR and MASTER_PORT.*torchrun", open_store, 0, environ={})
    with pytest.raises(UserError, match="MASTER_PORT=http is not a port: start the processes with torchrun"):
        open_store(0, environ={"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"})


def test_the_main_process_serves_the_store_unless_torchrun_does():
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    served = open_store(0, environ=where)
    for rank in (0, 1):
        client = open_store(rank, environ={**where, "TORCHELASTIC_USE_AGENT_STORE": "True"})
        client.set(f"key {rank}", "value")
        assert served.get(f"key {rank}") == b"value"
