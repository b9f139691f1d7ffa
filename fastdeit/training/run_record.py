"""`run.json`: a run's id, and for each of its starts the command, the machines and the versions."""

import collections
import importlib.metadata
import json
import os
import platform
import secrets
import shlex
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fastdeit.distributed import World
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.files import atomic_write
from fastdeit.pipelines.parsing import read_json
from fastdeit.version import __version__

NAME = "run.json"
_MOST = 16 << 20  # bytes of run.json
_STARTS = 500  # the last ones are kept
_PACKAGES = ("torch", "triton", "timm", "numpy", "numba", "pillow", "ffcv", "nvidia-dali-cuda120")


def describe_processes(world: World) -> dict[str, list[str]]:
    """The devices of the run's processes by host, in the order of their ranks. Call it on all processes."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
    hosts = collections.defaultdict[str, list[str]](list)
    for host, name in world.gathered((socket.gethostname(), device)):
        hosts[host].append(name)
    return dict(hosts)


def record_start(folder: Path, processes: dict[str, list[str]], checkpoint: Path | None) -> str:
    """Add a start to the run's `run.json`, and return the run's id, which all its starts share.

    processes   from `describe_processes`
    checkpoint  the one that the run continues from

    Raises OSError if the file cannot be written. If it is not such a record, raises ValueError and leaves it as it is.
    """
    path = folder / NAME
    record = _read(path) if path.exists() else {"id": secrets.token_hex(4), "starts": []}
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "folder": os.getcwd(),
        "processes": processes,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "commit": source_commit(),
        "versions": versions(),
    }
    record["starts"] = [*record["starts"], start][-_STARTS:]
    with atomic_write(path) as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())
    return record["id"]


def started_in(folder: Path) -> Path | None:
    """The folder in which the run in `folder` was last started; None if its `run.json` does not say."""
    try:
        return Path(_read(folder / NAME)["starts"][-1]["folder"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def began_from(folder: Path, checkpoint: str) -> bool:
    """Whether the `run.json` in `folder` names a start from `checkpoint`."""
    try:
        return any(start["checkpoint"] == checkpoint for start in _read(folder / NAME)["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def version(package: str) -> str | None:
    """The version of an installed package; None if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of Python, CUDA, fastdeit and the packages that it computes with; None for one that is missing."""
    own = {"python": platform.python_version(), "fastdeit": __version__, "cuda": torch.version.cuda}
    return {**own, **{name: version(name) for name in _PACKAGES}}


def source_commit(file: Path = Path(__file__)) -> str | None:
    """The commit of the git checkout that `file` belongs to, with "-dirty" if a tracked file of it has changed.

    None without git, or if the checkout does not track `file`: a package may be installed inside another project.
    """
    git = ["git", "-C", str(file.parent)]

    def ask(*words: str) -> str:
        return subprocess.run([*git, *words], capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", file.name)
        commit, changed = ask("rev-parse", "HEAD"), ask("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("-dirty" if changed else "")


def _read(path: Path) -> dict[str, Any]:
    try:
        record = read_json(path, _MOST)
        if isinstance(record["id"], str) and 0 < len(record["id"]) <= 64 and isinstance(record["starts"], list):
            return record
    except (UserError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is not a record that fastdeit wrote")
