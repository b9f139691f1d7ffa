"""How the processes of a run meet, before they compute anything together.

torchrun keeps one store through all of its restarts, and its workers would write the same keys into it at each start.
A worker that starts again may then read the address of one that is dead, and wait for it. The number of the restart
does not tell the starts apart: each machine counts its own. So the main process names each start anew, and hands the
name to whoever asks now; all keys of that start lie under it.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.parsing import parse_json
from fastdeit.version import __version__

MINUTES = 10.0  # from the first process that joins to the last
SKEW = 60.0  # seconds by which clocks may differ without a warning
_POLL = 0.05  # seconds between two looks at a key
_READ = 5.0  # seconds for the others to read why the start is refused
_CONNECT = 5.0  # seconds of one attempt to reach the store


@dataclass(frozen=True)
class Peer:
    """A process of the run."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on host {self.host})"


@dataclass(frozen=True)
class Meeting:
    """All processes of one start.

    store     holds the keys of this start alone
    peers     by rank
    warnings  sentences for the main process to print
    """

    store: dist.Store
    peers: tuple[Peer, ...]
    warnings: tuple[str, ...] = ()


def open_store(rank: int, minutes: float = MINUTES, environ: Mapping[str, str] = os.environ) -> dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT: torchrun's, or one that the main process serves.

    Raises UserError if a variable is missing, if the port is taken, or if nobody serves it within `minutes`.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise UserError(
            f"RANK and WORLD_SIZE are set, but not {' and '.join(missing)}: start the processes by torchrun"
        )
    host, port, deadline = environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), time.monotonic() + 60 * minutes
    serves = rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while True:
        seconds = max(0.1, min(_CONNECT, deadline - time.monotonic()))
        try:
            return dist.TCPStore(
                host, port, is_master=serves, timeout=timedelta(seconds=seconds), wait_for_workers=False
            )
        except dist.DistError as error:
            reason = str(error).splitlines()[0]
            if serves:
                raise UserError(
                    f"rank 0 on host {socket.gethostname()} cannot listen on port {port} ({reason}): end the program "
                    f"that uses it (ss -ltnp shows it), or give torchrun another port in --rdzv-endpoint"
                ) from error
            if time.monotonic() >= deadline:
                raise UserError(
                    f"rank {rank} on host {socket.gethostname()} cannot reach the store at {host}:{port} for "
                    f"{minutes:g} minutes ({reason}): check that the first machine is up, and that no firewall "
                    f"closes the port"
                ) from error


def meet(store: dist.Store, rank: int, size: int, facts: Mapping[str, str], minutes: float = MINUTES) -> Meeting:
    """Wait for all processes of this start, and compare their versions and `facts` with the main process's.

    Raises UserError, the same sentence on all processes, if some have not come within `minutes`, or if facts differ. It
    names ranks, hosts and what differs.
    """
    versions = {"fastdeit": __version__, "torch": torch.__version__}
    card = {"host": socket.gethostname(), "pid": os.getpid(), "facts": {**versions, **facts}}
    end = time.monotonic() + 60 * minutes
    if rank == 0:
        held, result = _receive(store, size, card, end, minutes)
    else:
        held, result = _ask(store, rank, card, end, minutes)
    if result["refused"] is not None:
        raise UserError(result["refused"])
    peers = tuple(Peer(number, host, pid) for number, (host, pid) in enumerate(result["peers"]))
    return Meeting(dist.PrefixStore("group", held), peers, tuple(result["warnings"]))


def _asks(rank: int) -> str:
    return f"fastdeit/asks/{rank}"


def _receive(
    store: dist.Store, size: int, card: dict[str, Any], end: float, minutes: float
) -> tuple[dist.Store, dict[str, Any]]:
    """The main process's part: name this start to everybody who asks, and judge their cards."""
    name = uuid.uuid4().hex
    held = dist.PrefixStore(f"fastdeit/starts/{name}", store)
    cards, warnings, told = {0: card}, list[str](), dict[int, bytes]()
    while len(cards) < size and time.monotonic() < end:
        for rank in (rank for rank in range(1, size) if rank not in cards):
            if store.check([_asks(rank)]):
                token = store.get(_asks(rank))
                if told.get(rank) != token:  # a question of an earlier start is answered too: nobody reads it
                    store.set(f"fastdeit/names/{token.decode()}", name)
                    told[rank] = token
            if held.check([f"card/{rank}"]):
                cards[rank] = parse_json(held.get(f"card/{rank}"))
                skew = cards[rank]["clock"] - time.time()
                if abs(skew) > SKEW:
                    warnings.append(
                        f"the clock of {_peer(rank, cards[rank])} is {abs(skew):.0f} seconds "
                        f"{'ahead of' if skew > 0 else 'behind'} that of {_peer(0, card)}: times in logs will not match"
                    )
        time.sleep(_POLL)
    refused = _missing(cards, size, minutes) if len(cards) < size else _difference(cards)
    peers = [(cards[rank]["host"], cards[rank]["pid"]) for rank in range(size)] if refused is None else []
    result = {"refused": refused, "warnings": warnings, "peers": peers}
    held.set("result", json.dumps(result))
    if refused is not None:  # this process ends now, and may serve the store from which the others read why
        end = time.monotonic() + _READ
        for rank in cards.keys() - {0}:
            _wait(held, f"read/{rank}", end)
    return held, result


def _ask(
    store: dist.Store, rank: int, card: dict[str, Any], end: float, minutes: float
) -> tuple[dist.Store, dict[str, Any]]:
    """Another process's part: ask for the name of this start, hand in the card, and wait for the main process."""
    token = uuid.uuid4().hex
    try:
        store.set(_asks(rank), token)
        name = _wait(store, f"fastdeit/names/{token}", end)
        if name is not None:
            held = dist.PrefixStore(f"fastdeit/starts/{name.decode()}", store)
            held.set(f"card/{rank}", json.dumps({**card, "clock": time.time()}))
            # The main process, whose time may end a little later, knows more.
            result = _wait(held, "result", end + 30)
            if result is not None:
                held.set(f"read/{rank}", "")
                return held, parse_json(result)
    except dist.DistError as error:
        raise UserError(
            f"{_peer(rank, card)} has lost the store before all processes had joined: rank 0 or torchrun has ended, "
            f"and its log has the reason"
        ) from error
    raise UserError(
        f"rank 0 has not joined {_peer(rank, card)} within {minutes:g} minutes: its machine's log has the reason"
    )


def _wait(store: dist.Store, key: str, end: float) -> bytes | None:
    """The value of `key` once it is there. It polls, since a signal is not heard inside the store's own wait."""
    while not store.check([key]):
        if time.monotonic() > end:
            return None
        time.sleep(_POLL)
    return store.get(key)


def _peer(rank: int, card: dict[str, Any]) -> Peer:
    return Peer(rank, card["host"], card["pid"])


def _missing(cards: dict[int, dict[str, Any]], size: int, minutes: float) -> str:
    missing = [rank for rank in range(size) if rank not in cards]
    hosts = sorted({card["host"] for card in cards.values()})
    return (
        f"{ranks(missing)} of {size} processes {'has' if len(missing) == 1 else 'have'} not joined within {minutes:g} "
        f"minutes; those that joined run on {', '.join(hosts)}: look at the log of the other machines or processes"
    )


def _difference(cards: dict[int, dict[str, Any]]) -> str | None:
    """A sentence that names, for each host that differs from the main process, all that differs there."""
    ours = cards[0]["facts"]
    found: dict[str, str] = {}
    for rank, card in sorted(cards.items()):
        theirs = card["facts"]
        names = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
        if names and card["host"] not in found:
            values = ", ".join(f"{name} {theirs.get(name)} instead of {ours.get(name)}" for name in names)
            found[card["host"]] = f"{_peer(rank, card)} has {values}"
    if not found:
        return None
    return (
        f"{'; '.join(found.values())} on {_peer(0, cards[0])}: give all machines the same command, the same files, "
        f"and the same versions"
    )


def ranks(numbers: list[int]) -> str:
    """ "rank 3", or "ranks 3, 5"; of many only the first eight."""
    named = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank{'s' * (len(numbers) > 1)} {named}"
