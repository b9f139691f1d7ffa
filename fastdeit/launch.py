"""How the run was launched: by torchrun, or as one process."""

import os
import sys
from collections.abc import Mapping

from fastdeit.pipelines.errors import UserError

# Variables in which launchers count their tasks, and the launchers' names.
_COUNTS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
}
_REMEDY = (
    "start one task on each node, and in it torchrun: srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_NNODES "
    "--nproc_per_node=GPUS --rdzv_backend=c10d --rdzv_endpoint=FIRST_NODE:29500 -m fastdeit.train RECIPE ..."
)


def prepare() -> None:
    """The first call of a command that computes, before PyTorch is imported.

    Raises UserError if a launcher other than torchrun started several processes.
    """
    warning = check_launch()
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    # Loader threads share the cores with PyTorch's. A spinning OpenMP thread keeps the thread that it waits for off its
    # core: with one core taken, training ran at a tenth of the speed. OpenMP reads this when PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def rank(environ: Mapping[str, str] = os.environ) -> int:
    """The rank of this process."""
    return int(environ.get("RANK", 0))


def size(environ: Mapping[str, str] = os.environ) -> int:
    """The number of processes in the run."""
    return int(environ.get("WORLD_SIZE", 1))


def check_launch(environ: Mapping[str, str] = os.environ) -> str | None:
    """A warning if a SLURM job has more tasks than this one, else None.

    Raises UserError if a launcher other than torchrun started several processes: each would train alone.
    """
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


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else 0
