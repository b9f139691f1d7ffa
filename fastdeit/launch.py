"""How the run was launched: by torchrun, or as one process."""

import contextlib
import functools
import os
import select
import sys
import threading
import time
from collections.abc import Mapping

from fastdeit.pipelines.errors import UserError
from fastdeit.signals import end_at_once

# Variables in which launchers count their tasks, and the launchers' names.
_COUNTS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
}
_PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_REMEDY = (
    "start one task on each node, and in it torchrun: srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_NNODES "
    "--nproc_per_node=GPUS --rdzv_backend=c10d --rdzv_endpoint=FIRST_NODE:29500 -m fastdeit.train RECIPE ..."
)


def prepare() -> None:
    """The first call of a command that computes, before PyTorch is imported.

    From then on, a process that torchrun started ends when torchrun ends. Raises UserError if a launcher other than
    torchrun started several processes.
    """
    for warning in (check_launch(), check_store()):
        if warning is not None:
            print(f"warning: {warning}", file=sys.stderr)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with(os.getppid())
    # Loader threads share the cores with PyTorch's. A spinning OpenMP thread keeps the thread that it waits for off its
    # core: with one core taken, training ran at a tenth of the speed. OpenMP reads this when PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    announce_start()


def announce_start() -> None:
    """Say on a terminal that PyTorch is being imported; nothing else is printed for some seconds."""
    if "torch" not in sys.modules and os.environ.get("RANK", "0") == "0" and sys.stderr.isatty():
        print("starting PyTorch ...", file=sys.stderr, flush=True)


@functools.cache  # a program may train several times
def _end_with(parent: int) -> None:
    """End this process, naming the reason, as soon as process `parent` has ended.

    torchrun stops its workers itself, unless it is killed. The kernel could kill this process at that moment
    (PR_SET_PDEATHSIG), but then nobody would learn why. The main thread may be blocked in a collective operation, where
    it handles no signal, so another thread waits for the parent's end.
    """
    threading.Thread(target=_wait_and_end, args=(parent,), name="fastdeit-parent", daemon=True).start()


def _wait_and_end(parent: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not Linux, an old kernel, or the parent is gone already
        descriptor = os.pidfd_open(parent)
        if os.getppid() == parent:  # else the id has been reused for another process
            select.select([descriptor], [], [])
    while os.getppid() == parent and not _is_orphan(parent):
        time.sleep(1)
    end_at_once(f"torchrun (process {parent}), which started rank {rank()} (process {os.getpid()}), has ended")


def _is_orphan(parent: int) -> bool:
    """Whether torchrun had ended before `parent` was read, which is then the system's first process."""
    if parent != 1:
        return False
    try:  # in a container, torchrun itself may be the first process
        return not os.path.basename(os.readlink("/proc/1/exe")).startswith("python")
    except OSError:
        return False


def rank(environ: Mapping[str, str] = os.environ) -> int:
    """The rank of this process."""
    return int(environ.get("RANK", 0))


def size(environ: Mapping[str, str] = os.environ) -> int:
    """The number of processes in the run."""
    return int(environ.get("WORLD_SIZE", 1))


def check_launch(environ: Mapping[str, str] = os.environ) -> str | None:
    """A warning if a SLURM job has more tasks than this one, else None.

    Raises UserError if a launcher other than torchrun started several processes: each would train alone. Likewise for
    torchrun's variables with values that torchrun does not set.
    """
    given = {name: environ[name] for name in _PLACES if name in environ}
    if not all(text.isdecimal() for text in given.values()) or not rank(environ) < size(environ):
        raise UserError(
            f"{', '.join(f'{name}={text}' for name, text in given.items())}: torchrun sets no such values: start the "
            f"processes with torchrun, or unset the variable{'s' * (len(given) > 1)} to run one process"
        )
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return None
    for variable, launcher in _COUNTS.items():
        if _number(environ, variable) > 1:
            raise UserError(
                f"{launcher} started {environ[variable]} tasks, but without torchrun each would train alone: {_REMEDY}"
            )
    tasks = environ.get("SLURM_NTASKS", "")
    if _number(environ, "SLURM_NTASKS") <= 1 or "SLURM_PROCID" not in environ or "SLURM_STEP_NUM_TASKS" in environ:
        return None
    if _number(environ, "SLURM_PROCID") > 0:
        raise UserError(f"SLURM started {tasks} tasks, but without torchrun each would train alone: {_REMEDY}")
    return f"the SLURM job has {tasks} tasks, and this run uses one. For all of them {_REMEDY}"


def check_store(environ: Mapping[str, str] = os.environ) -> str | None:
    """A warning if a machine that fails could not rejoin the job, else None.

    torchrun publishes the address of the store that it serves only once, so a torchrun that starts later never gets it.
    """
    several = _number(environ, "GROUP_WORLD_SIZE") > 1 and _number(environ, "RANK") == 0
    if not several or environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return (
        "a machine that fails cannot rejoin this job: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on "
        "all machines"
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else 0
