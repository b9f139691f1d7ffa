"""torchrun on one or two machines, its agent and its workers forked; a machine is a network namespace with a name."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import uuid

import psutil

from fastdeit import joining
from forked import Forked, run_module
from system import run

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWUTS, _CLONE_NEWNET = 0x04000000, 0x40000000


def run_elastic(words, options, machine=None, version=None, before=None):
    """What `torchrun OPTIONS -m fastdeit.train WORDS` does.

    options   of `LaunchConfig`; one process on one machine unless they say otherwise
    machine   where it runs; None: here
    version   of fastdeit that this machine has
    before    function that each worker calls first, in its own process
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if machine is not None:
        machine.enter()
    if version is not None:
        joining.__version__ = version
    config = LaunchConfig(**{
        "min_nodes": 1, "max_nodes": 1, "nproc_per_node": 1, "run_id": uuid.uuid4().hex, "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0", "max_restarts": 0, "start_method": "fork", **options,
    })  # fmt: skip
    elastic_launch(config, _work)(words, before)


def _work(words, before):
    if before is not None:
        before()
    run_module("fastdeit.train", words)


def elastic(words, *, machine=None, version=None, before=None, **options):
    """A process that runs `run_elastic`."""
    return Forked(run_elastic, words, options, machine, version, before)


class Machine:
    """A network namespace with one address and a host name of its own.

    Needs root, and `ip`; `missing()` says what is not there.
    """

    def __init__(self, name, address, link):
        self.name, self.address, self.link = name, address, link
        self.namespace = f"fastdeit-{os.getpid()}-{name}"
        ip("netns", "add", self.namespace)

    def up(self):
        ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", self.link)
        for link in (self.link, "lo"):
            ip("-n", self.namespace, "link", "set", link, "up")

    def enter(self):
        """Move this process, and those that it starts, to the machine."""
        with open(f"/run/netns/{self.namespace}") as file:
            _check(_LIBC.setns(file.fileno(), _CLONE_NEWNET))
        _check(_LIBC.unshare(_CLONE_NEWUTS))
        socket.sethostname(self.name)
        os.environ["GLOO_SOCKET_IFNAME"] = self.link

    def cut(self):
        """Take the machine off the network, without a word to the other."""
        ip("-n", self.namespace, "link", "set", self.link, "down")

    def mend(self):
        ip("-n", self.namespace, "link", "set", self.link, "up")

    def remove(self):
        ip("netns", "delete", self.namespace)


def ip(*words):
    run("ip", *words, check=True)


def missing():
    """Why this machine cannot make network namespaces; None if it can."""
    try:
        ip("netns", "add", f"fastdeit-{os.getpid()}")
        ip("netns", "delete", f"fastdeit-{os.getpid()}")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces here: {error}"
    return None


def two_machines():
    """Two machines that a cable joins, the first at 10.77.0.1."""
    links = [f"fd{os.getpid() % 10**6}{end}" for end in "ab"]
    machines = [Machine(name, f"10.77.0.{i + 1}", links[i]) for i, name in enumerate(("alpha", "beta"))]
    ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
    for machine in machines:
        ip("link", "set", machine.link, "netns", machine.namespace)
        machine.up()
    return machines


def _check(result):
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def workers(agent):
    """The living processes that `agent` started, by local rank."""
    children = psutil.Process(agent.pid).children()
    return sorted((p for p in children if p.status() != psutil.STATUS_ZOMBIE), key=lambda p: (p.create_time(), p.pid))


def printed(agent):
    """What `agent` and its workers have printed to stderr so far."""
    return agent._files[1].read_text()


def kill_tree(process):
    """Kill a process and all that it started, as the loss of a machine does."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=60)


def words_of(recipe):
    """The words of `fastdeit-train` for a recipe."""
    folder = recipe.run.output
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.parent / f"{folder.name}.json"
    file.write_text(json.dumps(recipe.to_dict()))
    return [recipe.name, "--config", str(file)]


def logged(recipe):
    """The number of steps in the run's log."""
    path = recipe.run.output / "log.jsonl"
    return path.read_text().count('"event": "train"') if path.exists() else 0


@contextlib.contextmanager
def starter():
    """Function that starts torchrun on a recipe, as `elastic` does; what is left of it is killed at the end."""
    started = []

    def start(recipe, **options):
        started.append(elastic(words_of(recipe), **options))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            kill_tree(process)
