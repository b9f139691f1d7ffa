"""Commands in processes forked from one that has imported PyTorch and timm: a start takes 0.1 s, not 6 s of CPU.

Each process starts from the same state, has run nothing before, and is killed like any other.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.helpers.warm", "fastdeit.training.trainer", "tyro", "torchvision.datasets"])


class Forked:
    """A process that calls a function; the part of `subprocess.Popen` that tests use."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] = os.environ):
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("out", "err")]
        self._process = _SERVER.Process(target=_call, args=(self._files, dict(environment), function, arguments))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} has not ended after {timeout} s")
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed to stdout and stderr, once it has ended."""
        self.wait(timeout)
        out, err = (file.read_text() if file.exists() else "" for file in self._files)
        return out, err

    def finish(self, timeout: float = 300) -> tuple[str, str]:
        """The same, once it has ended without an error."""
        out, err = self.communicate(timeout)
        assert self.returncode == 0, f"{out}\n{err}"
        return out, err


def succeed(function: Callable[..., Any], *arguments: Any) -> tuple[str, str]:
    """What a process that calls the function printed, once it has ended without an error."""
    return Forked(function, *arguments).finish()


def run_module(module: str, words: Sequence[str]) -> None:
    """What `python -m MODULE WORDS` does."""
    sys.argv[1:] = words
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:  # torchrun's workers have to return
            raise


def run_code(code: str, words: Sequence[str] = ()) -> None:
    """What `python -c CODE WORDS` does."""
    sys.argv[1:] = words
    exec(code, {"__name__": "__main__"})


def run_module_twice(module: str, words: Sequence[str]) -> None:
    """What `torchrun --standalone --nproc_per_node=2 -m MODULE WORDS` does, its workers forked as well."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork",
    )  # fmt: skip
    elastic_launch(config, run_module)(module, words)


def _call(files: Sequence[Path], environment: Mapping[str, str], function: Callable[..., Any], arguments: Any) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for file, stream in zip(files, (sys.stdout, sys.stderr), strict=True):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
    function(*arguments)
