"""How the processes of a run join, before they compute anything together.

torchrun keeps one store through all of its restarts, and its workers would write the same keys into it at each start. A
restarted worker could then read the address of a dead one, and wait for it. The restart count does not tell the starts
apart, because each machine counts its own. So the main process chooses a new name for each start and sends it to every
process that asks; the name is the prefix of all keys of that start.
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
_POLL = 0.05  # seconds between two checks of a key
_READ = 5.0  # seconds that the others have to read why the start is refused
_CONNECT = 5.0  # seconds for one attempt to reach the store


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

    store     holds only the keys of this start
    peers     by rank
    warnings  sentences for the main process to print
    """

    store: dist.Store
    peers: tuple[Peer, ...]
    warnings: tuple[str, ...] = ()


def open_store(rank: int, minutes: float = MINUTES, environ: Mapping[str, str] = os.environ) -> dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT: torchrun's, or one that the main process serves.

    Raises UserError if a variable is missing or wrong, if the port is taken, or if no store answers there within
    `minutes`.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise UserError(
            f"RANK and WORLD_SIZE are set, but not {' and '.join(missing)}: start the processes with torchrun"
        )
    if not environ["MASTER_PORT"].isdecimal():
        raise UserError(f"MASTER_PORT={environ['MASTER_PORT']} is not a port: start the processes with torchrun")
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
                    f"rank {rank} on host {socket.gethostname()} could not reach the store at {host}:{port} "
                    f"within {minutes:g} minutes ({reason}): check that {host} is up and that no firewall blocks "
                    f"the port"
                ) from error


def meet(store: dist.Store, rank: int, size: int, facts: Mapping[str, str], minutes: float = MINUTES) -> Meeting:
    """Wait for all processes of this start, and compare their versions and `facts` with the main process's.

    Raises UserError, with the same message on all processes, if some have not joined within `minutes`, or if facts
    differ. The message names the ranks, the hosts and the differences. Raises it also if the store is lost meanwhile.
    """
    versions = {"fastdeit": __version__, "torch": torch.__version__}
    card = {"host": socket.gethostname(), "pid": os.getpid(), "facts": {**versions, **facts}}
    end = time.monotonic() + 60 * minutes
    try:
        if rank == 0:
            held, result = _receive(store, size, card, end, minutes)
        else:
            held, result = _ask(store, rank, card, end, minutes)
    except dist.DistError as error:
        raise UserError(
            f"{_peer(rank, card)} has lost its connection to the store before all processes had joined: "
            f"{'rank 0 or ' * (rank > 0)}torchrun has ended, and its log has the reason"
        ) from error
    if result["refused"] is not None:
        raise UserError(result["refused"])
    peers = tuple(Peer(number, host, pid) for number, (host, pid) in enumerate(result["peers"]))
    return Meeting(dist.PrefixStore("group", held), peers, tuple(result["warnings"]))


def _asks(rank: int) -> str:
    return f"fastdeit/asks/{rank}"


def _receive(
    store: dist.Store, size: int, card: dict[str, Any], end: float, minutes: float
) -> tuple[dist.Store, dict[str, Any]]:
    """The main process's part: send the start's name to every process that asks, and compare their cards."""
    name = uuid.uuid4().hex
    held = dist.PrefixStore(f"fastdeit/starts/{name}", store)
    cards, warnings, told = {0: card}, list[str](), dict[int, bytes]()
    while len(cards) < size and time.monotonic() < end:
        for rank in (rank for rank in range(1, size) if rank not in cards):
            if store.check([_asks(rank)]):
                token = store.get(_asks(rank))
                if told.get(rank) != token:  # an earlier start's question is answered too; nobody reads that
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
    if refused is not None:  # this process ends now, and may serve the store: let the others read why first
        end = time.monotonic() + _READ
        for rank in cards.keys() - {0}:
            _wait(held, f"read/{rank}", end)
    return held, result


def _ask(
    store: dist.Store, rank: int, card: dict[str, Any], end: float, minutes: float
) -> tuple[dist.Store, dict[str, Any]]:
    """Another process's part: ask for the start's name, hand in the card, and wait for the main process's result."""
    token = uuid.uuid4().hex
    store.set(_asks(rank), token)
    name = _wait(store, f"fastdeit/names/{token}", end)
    if name is not None:
        held = dist.PrefixStore(f"fastdeit/starts/{name.decode()}", store)
        held.set(f"card/{rank}", json.dumps({**card, "clock": time.time()}))
        # The main process may time out a little later than this one, and its message says more.
        result = _wait(held, "result", end + 30)
        if result is not None:
            held.set(f"read/{rank}", "")
            return held, parse_json(result)
    raise UserError(
        f"rank 0 has not answered {_peer(rank, card)} within {minutes:g} minutes: the log of its machine has the reason"
    )


def _wait(store: dist.Store, key: str, end: float) -> bytes | None:
    """The value of `key` once it exists, None after `end`. Polls, since the store's own wait would delay signals."""
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
        f"minutes; those that joined run on {', '.join(hosts)}: look at the logs of the other machines or processes"
    )


def _difference(cards: dict[int, dict[str, Any]]) -> str | None:
    """A sentence with all differences from the main process on each host that differs; None if none does."""
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
    """ "rank 3", or "ranks 3, 5"; names at most eight."""
    named = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank{'s' * (len(numbers) > 1)} {named}"
