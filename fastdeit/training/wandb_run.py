"""`run.wandb`: the curves of TensorBoard in Weights & Biases as well."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdeit.pipelines.errors import UserError
from fastdeit.training.logs import RunLog


def open_wandb(project: str, run_id: str, folder: Path, recipe: dict[str, Any], log: RunLog) -> Callable[[], None]:
    """Start a run of Weights & Biases that takes over all that the log writes for TensorBoard; returns its end.

    run_id  that of `run.json`, so all starts of a run are one run there too
    recipe  shown as the run's configuration

    Call it before the log's next event. Raises UserError if the package is missing, or cannot start a run.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError("run.wandb needs Weights & Biases: pip install 'fastdeit[wandb]'") from error
    try:
        run = wandb.init(
            project=project,
            id=run_id,
            name=folder.name,
            resume="allow",
            dir=folder,
            config=recipe,
            sync_tensorboard=True,
            # Its own wrapper around stdout would see each line of the progress bar.
            settings=wandb.Settings(console="off", silent=True),
        )
    except Exception as error:  # its own errors, and whatever its server answers
        raise UserError(
            f"run.wandb: Weights & Biases cannot be started ({error}): run `wandb login`, set WANDB_MODE=offline, or "
            f"leave out --run.wandb"
        ) from error
    log.say(f"Weights & Biases: project {project}, run {run_id}{f', {run.url}' if run.url else ' (offline)'}")
    return run.finish
