"""The training loop."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastdeit import checkpoint
from fastdeit.budget.plan import Plan
from fastdeit.config import Recipe
from fastdeit.data import EvaluationData, TrainBatch
from fastdeit.distributed import World
from fastdeit.effects import frozen_mode
from fastdeit.inputs import DataSets, open_data_sets
from fastdeit.memory import enough_to_train
from fastdeit.model.deit import DeiT
from fastdeit.model.kernel_choice import choose_kernels
from fastdeit.model.networks import ConvnetStudent
from fastdeit.pipelines.loaders.prefetch import Prefetcher
from fastdeit.precision import check_residual_dtype
from fastdeit.setup import (
    build_student,
    copied_here,
    open_evaluation_data,
    open_teaching,
    open_training_data,
    set_up,
    teacher_in_loop,
)
from fastdeit.signals import StopSignals
from fastdeit.teacher.checks import teacher_warnings
from fastdeit.teacher.label_cache import labelled_pixels
from fastdeit.training.best import note_best
from fastdeit.training.checkpoint_writer import CheckpointWriter
from fastdeit.training.data_wait import DataWait
from fastdeit.training.divergence import DivergedError, DivergenceGuard, save_evidence
from fastdeit.training.evaluation import Scores, evaluate, swapped_weights
from fastdeit.training.gpu_health import GpuHealth
from fastdeit.training.logs import RunLog
from fastdeit.training.meter import EpochImages, Meter, PendingNumbers
from fastdeit.training.profiling import open_profiler
from fastdeit.training.reports import (
    report_best,
    report_end,
    report_gpus,
    report_images,
    report_pace,
    report_profile,
    report_resume,
    report_rewind,
    report_scores,
    report_top1,
    report_waits,
    report_window,
)
from fastdeit.training.resume import (
    Kept,
    checkpoint_choices,
    effective,
    go_back,
    restore,
    set_damaged_aside,
    snapshot,
)
from fastdeit.training.run_folder import RunFolder
from fastdeit.training.run_lock import RunLock
from fastdeit.training.run_record import describe_processes
from fastdeit.training.startup import announce, forecast_run, recipe_warnings
from fastdeit.training.state import RunState
from fastdeit.training.step import TrainingStep
from fastdeit.training.stop import Stop
from fastdeit.training.wandb_run import open_wandb


class Trainer:
    """One run on one process.

    Everything random in a step is a function of (seed, epoch, step), so a checkpoint holds the weights, their average,
    the optimizer's moments and the number of the next step.
    """

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        lock: RunLock | None = None,
        sets: DataSets | None = None,
        signals: StopSignals | None = None,
    ) -> None:
        """`lock` (the run folder's) and `sets` are opened here unless the caller has opened them already.

        signals  a signal ends the program after the step, with a checkpoint; None: signals are not handled here
        """
        self.recipe, self.world = recipe, world
        self.stop = Stop(world, signals, recipe.run.checkpoint_minutes)
        self.state = RunState(Path(recipe.run.output))
        self.meter, self.images = Meter(world), EpochImages(world)
        self.guard, self.gpus = DivergenceGuard(recipe.run, world), GpuHealth(world)
        self.last_scores: dict[str, Scores] = {}
        with ExitStack() as stack, enough_to_train(recipe, world.size, world.device):
            self._open(stack, lock, sets)
            self._stack = stack.pop_all()

    def _open(self, stack: ExitStack, lock: RunLock | None, sets: DataSets | None) -> None:
        """Open everything that the run needs; `stack` closes it."""
        recipe, world, run, folder = self.recipe, self.world, self.recipe.run, self.state.folder
        self.messages: list[str] = []
        self.forecast: Plan | None = None
        self.run_folder = RunFolder(recipe, lock) if world.main else None
        if self.run_folder is not None:
            stack.callback(self.run_folder.close)
        self.log = RunLog(
            folder,
            active=world.main,
            tensorboard=run.tensorboard,
            progress=run.progress,
            global_batch=run.global_batch,
        )
        self.end_wandb: Callable[[], object] = lambda: None
        stack.callback(lambda: self.end_wandb())  # once the log is closed: it reads TensorBoard's files
        stack.callback(self.log.close)
        self.writer = CheckpointWriter(self.state.checkpoints, run, self.log) if world.main else None
        if self.writer is not None:
            stack.callback(self.writer.close)

        precision = set_up(recipe, world)
        check_residual_dtype(recipe, precision)
        sets = sets or open_data_sets(recipe)
        self.sets = sets = copied_here(recipe, sets, world, self.log.say)
        damaged = set_damaged_aside(recipe, folder) if world.main else []
        world.barrier()
        # Only the main process chooses the loader and the kernels, so only it reads the checkpoint's choices.
        kept = checkpoint_choices(recipe, folder) if world.main else Kept()
        pixels = (kept.pixels or labelled_pixels(recipe)) if world.main else None
        kernels = choose_kernels(recipe.model, precision, sets.num_classes, world, kept.kernels)
        self.data = open_training_data(
            recipe,
            sets.train,
            world,
            precision,
            kernels,
            teacher=teacher_in_loop(recipe),
            pixels=pixels,
            say=self.log.say,
        )
        stack.callback(self.data.close)
        self.val: EvaluationData | None = None
        if sets.val is not None:
            self.val = open_evaluation_data(
                recipe, sets.val, world, precision, kernels, images=sets.val_images, like=self.data
            )
            stack.callback(self.val.close)

        if self.gpus.fault is not None:
            self.messages.append(self.gpus.fault)
        model, messages = build_student(recipe, sets.num_classes, kernels, world, sets.train.class_names)
        self.messages += messages
        self.teaching = open_teaching(recipe, sets, self.data, world)
        steps, repeats = self.data.steps, self.data.repeats
        self.warnings = damaged + recipe_warnings(recipe, sets, steps=steps, repeats=repeats)
        if self.teaching.teacher is not None:
            self.warnings += teacher_warnings(recipe, self.teaching.teacher, sets, world, precision)
        self.train_step = TrainingStep(
            recipe,
            world,
            precision,
            model,
            kernels,
            num_classes=sets.num_classes,
            steps_per_epoch=self.data.steps,
            teacher=self.teaching.teacher,
            labels=self.teaching.labels,
            warn=self.log.warn,
        )
        self.effective = effective(self.train_step, self.data, self.teaching.fingerprint)
        # On a GPU the host reads the losses of a step while the next step runs, so the GPU never waits for the host.
        self.deferred = world.device.type == "cuda" and run.loss_sync == "deferred"
        self.waits = DataWait(world, sets.train.path)
        self.profiler = open_profiler(run, world, folder, steps_per_epoch=self.data.steps)

    @property
    def model(self) -> DeiT | ConvnetStudent:
        return self.train_step.model

    def run(self) -> dict[str, Scores]:
        """Train from the next step to the last epoch; returns the last scores by kind of weights."""
        with enough_to_train(self.recipe, self.world.size, self.world.device):
            return self._run()

    def _run(self) -> dict[str, Scores]:
        run, state, began = self.recipe.run, self.state, time.monotonic()
        try:
            self._start()
            if state.epoch and state.step == 0:
                self._evaluate_if_due()  # a kill may have come between the checkpoint and its evaluation
            if run.on_divergence == "rewind" and self._has_no_checkpoint():
                self._save(must=True)
            while state.epoch < run.epochs:
                try:
                    self._train_epochs()
                except DivergedError as error:
                    if run.on_divergence == "stop":
                        raise
                    self._go_back(error)
            if self.profiler is not None:
                self.log.say(
                    f"no profile: the run ended before {run.profile} more steps of one epoch, once it was warm"
                )
            report_end(self.log, state, time.monotonic() - began, self.forecast and self.forecast.total)
        finally:
            self.close()
        return self.last_scores

    def close(self) -> None:
        self._stack.close()

    def _has_no_checkpoint(self) -> bool:
        """Whether the run's own folder has no checkpoint: it begins, or continues from that of another folder."""
        return self.world.from_main(not checkpoint.found(self.state.checkpoints))

    def _start(self) -> None:
        """Continue from a checkpoint if there is one, and log how the run starts."""
        resumed, state = restore(self.state, self.train_step, self.effective), self.state
        if resumed is not None:
            self._restart(resumed.log)
        if self.teaching.labels is not None:
            self.teaching.labels.check_epochs(state.epoch, self.recipe.run.epochs)
        self.log.go_back(state.epoch, state.global_step, evaluates=state.step == 0 and self._is_evaluation_due())
        processes, run_id = describe_processes(self.world), None
        if self.run_folder is not None:
            self.messages += self.run_folder.notes
            self.run_folder.write_recipe()
            try:
                run_id = self.run_folder.record_start(processes, resumed and resumed.path)
            except (OSError, ValueError) as error:
                self.warnings.append(f"this start is not recorded: {error}")
            if run_id is not None and (project := self.recipe.run.wandb) is not None:
                self.end_wandb = open_wandb(project, run_id, self.state.folder, self.recipe.to_dict(), self.log)
        self.forecast = None if resumed is not None else forecast_run(self.train_step, self.sets)
        announce(
            self.log,
            self.train_step,
            self.data,
            self.sets,
            run_id=run_id,
            labels=self.teaching.labels,
            messages=self.messages,
            warnings=self.warnings,
            forecast=self.forecast,
        )
        if resumed is not None:
            report_resume(self.log, self.state, resumed, self.recipe, self.world.size)
        self.train_step.distribute()

    def _train_epochs(self) -> None:
        run, state = self.recipe.run, self.state
        with self.data.batches(state.epoch, state.step) as batches:
            while state.epoch < run.epochs:
                self._train_epoch(batches)
                self._look_after_folder()
                state.epoch, state.step = state.epoch + 1, 0
                self._save(must=state.epoch == run.epochs)
                self.stop.stepping(False)
                if self.stop.at_once():
                    self._save(must=True)
                    self._leave()
                self._evaluate_if_due()
                self.stop.stepping(True)

    def _go_back(self, error: DivergedError) -> None:
        """Load a checkpoint from before the divergence, and mark the steps that led there to be left out."""
        state, skipped = self.state, self.guard.steps_to_skip(error, self.state)
        if self.writer is not None:
            self.writer.forget()
        resumed = go_back(state, self.train_step, skipped[0])
        state.skipped.update(skipped)
        self._restart(resumed.log)
        self.log.go_back(state.epoch, state.global_step, evaluates=False)
        report_rewind(self.log, state, error, resumed, skipped)

    def _restart(self, log: dict[str, Any] | None) -> None:
        """Continue with the sums that the `log` had at a checkpoint."""
        self.meter, self.images = Meter(self.world), EpochImages(self.world)
        self.guard.forget()
        self.stop.forget()
        if log is not None:
            self.meter.load(log)
            self.images.load(log)
            self.guard.load(log["bands"])

    def _train_epoch(self, batches: Prefetcher[TrainBatch]) -> None:
        run, state, steps, meter = self.recipe.run, self.state, self.data.steps, self.meter
        self.train_step.model.train(not frozen_mode(self.recipe))
        meter.start(batches.wait_seconds)
        self.waits.start(batches.wait_seconds)
        self.log.progress.start_epoch(state.epoch, run.epochs, steps, state.step)
        pending: list[Callable[[], None]] = []  # each reads numbers of the device, and may wait for them
        while state.step < steps:
            batch = next(batches)
            self.waits.arrived(batches.wait_seconds)
            self.images.add(batch)
            if state.global_step + 1 in state.skipped:
                _read_all(pending)
            else:
                self._train_step(batch, pending)
            self.stop.stepping(True)  # from the first step on there is something to lose
            state.step += 1
            state.global_step += 1
            if state.global_step % run.log_every == 0 or state.step == steps:
                pending += self._pending_report(batches.wait_seconds)
                self.gpus.sample()
            # After the last step, the epoch's own checkpoint follows.
            saving = run.checkpoint_every and state.global_step % run.checkpoint_every == 0 and state.step < steps
            if not self.deferred or saving or state.step == steps:
                _read_all(pending)
            self.log.progress.advance()
            self._profile(batches.wait_seconds)
            if self.writer is not None:
                self.writer.poll()
            if state.global_step % run.log_every == 0:
                self._look_after_folder()
            if saving:
                self._save()
            due = self.stop.due(state.global_step, diverged=self.guard.found)
            if due == "rewind":
                self.guard.raise_together()
            if due is not None and state.step < steps:
                _read_all(pending)
                self._save(must=due == "stop")
                if due == "stop":
                    self._leave()
        meter.stop(batches.wait_seconds)
        self.log.progress.end_epoch()
        report_images(self.log, state.epoch, self.data.loader.name, self.images.state())
        self.images.clear()
        gpus = self.gpus.gathered()
        report_gpus(self.log, state.epoch, gpus, self.gpus.warnings(gpus))
        waits = self.waits.gathered(batches.wait_seconds)
        report_waits(self.log, state.epoch, waits, self.waits.warnings(waits))

    def _train_step(self, batch: TrainBatch, pending: list[Callable[[], None]]) -> None:
        """Update the weights once, read the previous step's `pending` numbers, and queue those of this step."""
        state, done = self.state, self.state.global_step + 1
        position = {"epoch": state.epoch, "step": state.step, "global_step": done}
        check = None if self.deferred else self._loss_check(batch, position, updated=False)
        parts = self.train_step(
            batch,
            state.epoch,
            state.step,
            state.global_step,
            None if check is None else lambda parts: check(float(parts.loss)),
        )
        # On a GPU the loop launches a step, then reads the numbers of the step before.
        _read_all(pending)
        if self.deferred:
            loss, check_later = PendingNumbers(parts.loss[None]), self._loss_check(batch, position, updated=True)
            pending.append(lambda: check_later(loss.tolist()[0]))
        self.meter.add(parts)

    def _loss_check(self, batch: TrainBatch, position: dict[str, int], *, updated: bool) -> Callable[[float], None]:
        """A function that checks the loss of a step, before or after the weights move."""

        save = partial(save_evidence, updated=updated, state=self.state, training=self.train_step, log=self.log)

        def check(loss: float) -> None:
            self.guard.check(loss, batch, position, self.state, save)
            self.log.progress.loss(loss)

        return check

    def _pending_report(self, wait_seconds: float) -> list[Callable[[], None]]:
        """A list of one function, which logs the steps since the last training line and may wait for their losses.

        Empty if all of these steps were left out.
        """
        run, state = self.recipe.run, self.state
        if not self.meter.steps:
            return []
        window = self.meter.read(wait_seconds, run.global_batch)
        left, parts = run.epochs * self.data.steps - state.global_step, self.recipe.parts()
        if parts.count > 1:  # later images are larger, and take longer
            work = sum(parts.work(epoch) for epoch in range(state.epoch, run.epochs)) / parts.work(state.epoch)
            left = self.data.steps * work - state.step
        eta = left * run.global_batch / window.images_per_second
        # The line names the step it follows; `state` already points at the next one.
        position, lr = {**state.position(), "step": state.step - 1}, self.train_step.lr
        return [lambda: report_window(self.log, window, eta=eta, lr=lr, position=position)]

    def _profile(self, wait_seconds: float) -> None:
        if self.profiler is None:
            return
        profile = self.profiler.step(self.data.steps - self.state.step, wait_seconds)
        if profile is not None:
            self.profiler = None
            report_profile(self.log, self.state, profile)

    def _is_evaluation_due(self) -> bool:
        run, epoch = self.recipe.run, self.state.epoch
        return self.val is not None and (epoch % run.eval_every == 0 or epoch == run.epochs)

    def _evaluate_if_due(self) -> None:
        run, departures = self.recipe.run, self.recipe.departures
        if self.val is None or not self._is_evaluation_due():
            return
        kinds: dict[str, dict[str, torch.Tensor] | None] = {"model": None}
        ema = self.train_step.ema
        if ema is not None and departures.ema_eval:
            kinds["ema"] = ema.shadow
        for kind, weights in kinds.items():
            with swapped_weights(self.model, weights):
                # A convnet's running statistics differ by process; a checkpoint holds those of the main process.
                self.world.broadcast(self.model.buffers())
                scores = evaluate(
                    self.model,
                    self.val,
                    self.world,
                    self.train_step.precision,
                    kernels=self.train_step.kernels,
                    progress=run.progress and self.world.main,
                )
            self.last_scores[kind] = scores
            report_scores(self.log, self.state, kind, scores)
        report_top1(self.log, self.state, self.last_scores, departures.late_fusion)
        images = self.train_step.steps_per_epoch * run.global_batch
        report_pace(self.log, self.state, self.recipe, images, self.train_step.num_classes, self.last_scores["model"])
        # Nothing looks after the folder while the run evaluates, and no step follows the last evaluation.
        if self.world.from_main(self._look_after_folder()):
            self._save(must=self.state.epoch == run.epochs)
        self._note_best()

    def _note_best(self) -> None:
        run = self.recipe.run
        if self.writer is None or run.best_metric == "none":
            return
        path = self.writer.latest(self.state.position())
        if path is None:
            return
        try:
            best = note_best(path, self.last_scores, run.best_metric, self.recipe.departures.late_fusion)
        except OSError as error:  # a full disk does not end a run
            self.log.warn(f"the scores of {path} cannot be compared with the best so far: {error}")
        else:
            report_best(self.log, best)

    def _save(self, *, must: bool = False) -> None:
        """Begin to write a checkpoint; if it `must` be written, wait until it is.

        Raises the disk's error if the checkpoint must be written and cannot be: see `CheckpointWriter`.
        """
        self.guard.check_weights(self.state, self.train_step)
        log = {**self.meter.state(), **self.images.state(), "bands": self.guard.state()}
        if self.writer is not None:
            self.writer.save(
                self.state.position(),
                lambda: snapshot(self.state, self.train_step, self.effective, self.sets.train.class_names, log),
            )
            if must:
                self.writer.wait(must=True)
        self.stop.saved()
        if must:
            self.world.barrier()  # if another process ended first, torchrun would end the main one

    def _look_after_folder(self) -> bool:
        """Create the run's folder or its last checkpoint again if somebody has removed it during the run.

        Returns whether a checkpoint must be written; False on processes other than the main one.
        """
        if self.run_folder is None or self.writer is None:
            return False
        try:
            gone = self.state.folder if self.run_folder.mend() else self.writer.gone()
        except OSError as error:
            self.log.warn(f"{self.state.folder} was removed during the run and cannot be created again: {error}")
            return False
        if gone is not None:
            self.log.warn(f"{gone} was removed during the run: a new checkpoint will be written")
            self.writer.forget()
            self.stop.save_soon()
        return gone is not None

    def _leave(self) -> NoReturn:
        """End the program because of a signal; the checkpoint is already written."""
        state = self.state
        self.stop.leaving()
        self.log.event("stopped", signal=self.stop.reason, **state.position())
        self.log.say(
            f"stopped by {self.stop.reason} at epoch {state.epoch + 1}, step {state.step}; no step is lost, and "
            f"the same command resumes the run"
        )
        self.stop.leave()


def _read_all(pending: list[Callable[[], None]]) -> None:
    for read in pending:
        read()
    pending.clear()
