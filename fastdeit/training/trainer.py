"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from fastdeit import __version__, checkpoint
from fastdeit.config import LITE0, Recipe
from fastdeit.data import EvaluationData, TrainBatch, TrainingData
from fastdeit.distributed import World
from fastdeit.effects import frozen_mode
from fastdeit.inputs import check_class_names, check_classes, open_dataset
from fastdeit.model.deit import DeiT
from fastdeit.model.kernel_choice import choose_kernels
from fastdeit.model.networks import ConvnetStudent, build_network
from fastdeit.model.weights import load_weights
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.checksums import unchecked
from fastdeit.pipelines.host.stage import compile_sentence
from fastdeit.pipelines.loaders.prefetch import Prefetcher
from fastdeit.setup import set_up
from fastdeit.stage_choice import image_dtype, image_layout
from fastdeit.teacher.label_cache import LabelCache, labelled_pixels, pixel_key
from fastdeit.teacher.teacher import Teacher
from fastdeit.training.evaluation import Scores, evaluate, headline
from fastdeit.training.logs import RunLog
from fastdeit.training.meter import Meter, OnItsWay
from fastdeit.training.nonfinite import check_loss, check_weights
from fastdeit.training.objective import LossParts, build_objective
from fastdeit.training.optim import peak_lr
from fastdeit.training.profiling import StepProfiler, room
from fastdeit.training.progress import duration
from fastdeit.training.reports import report_images, report_window
from fastdeit.training.resume import checkpoint_pixels, restore, snapshot, write_recipe
from fastdeit.training.resume_checks import START
from fastdeit.training.run_lock import RunLock
from fastdeit.training.startup import lr_sentence, mode_sentence, recipe_warnings, teacher_warnings
from fastdeit.training.step import TrainingStep


class Trainer:
    """One run on one process.

    Everything that is random in a step is a function of (seed, epoch, step), so the state is the weights, their
    average, the optimizer's moments and the next step.
    """

    def __init__(self, recipe: Recipe, world: World, lock: RunLock | None = None) -> None:
        """`lock` is the run folder's, where it was taken before; else the main process takes it here."""
        self.recipe, self.world = recipe, world
        self.folder = Path(recipe.run.output)
        with ExitStack() as stack:
            if world.main:
                self.lock = lock or RunLock(self.folder)
                stack.callback(self.lock.close)
            self._open(stack)
            self._stack = stack.pop_all()

    def _open(self, stack: ExitStack) -> None:
        """Put together all that the run needs; `stack` closes it."""
        recipe, world = self.recipe, self.world
        run, d = recipe.run, recipe.departures
        self.precision = set_up(recipe, world)
        self.train_set = open_dataset(recipe.data.train, "data.train")
        self.num_classes = recipe.model.num_classes or self.train_set.num_classes
        check_classes(self.train_set, self.num_classes)
        val_set = None
        if recipe.data.val is not None:
            val_set = open_dataset(recipe.data.val, "data.val")
            check_class_names(
                str(self.train_set.path), self.train_set.class_names, str(val_set.path), val_set.class_names
            )
            check_classes(val_set, self.num_classes)
        self.log = RunLog(
            self.folder,
            active=world.main,
            tensorboard=run.tensorboard,
            progress=run.progress,
            global_batch=run.global_batch,
        )
        stack.callback(self.log.close)
        # The main process chooses the loader, and reads the checkpoint for it.
        pixels = (checkpoint_pixels(recipe, self.folder) or labelled_pixels(recipe)) if world.main else None
        taught = recipe.objective.distillation != "none" and recipe.teacher.labels is None
        self.kernels = choose_kernels(recipe.model, self.precision, self.num_classes, world)
        dtype = image_dtype(recipe, self.precision, teacher=taught)
        layout = image_layout(self.kernels, teacher=taught)
        if recipe.data.stage != "device" and (sentence := compile_sentence()):
            self.log.say(sentence)
        self.data = TrainingData(recipe, self.train_set, world, dtype, layout, pixels=pixels)
        stack.callback(self.data.close)
        self.val: EvaluationData | None = None
        if val_set is not None:
            self.val = EvaluationData(
                recipe,
                val_set,
                world,
                image_dtype(recipe, self.precision, teacher=False),
                image_layout(self.kernels, teacher=False),
                loader=(self.data.loader.name.removesuffix("-mixed"), "as in training"),
                stage=(self.data.stage.name, "as in training"),
            )
            stack.callback(self.val.close)

        torch.manual_seed(run.seed)
        self.model: DeiT | ConvnetStudent = build_network(recipe.model, self.num_classes, self.kernels).to(world.device)
        self.messages: list[str] = []
        if recipe.model.init is not None:
            self.messages += load_weights(self.model, recipe.model.init)
        self.labels = self._open_labels()
        self.teacher = self._build_teacher()
        self.warnings = recipe_warnings(
            recipe, self.train_set, val_set, steps=self.data.steps, repeats=self.data.repeats
        )
        if self.teacher is not None:
            self.warnings += teacher_warnings(recipe, self.teacher, val_set or self.train_set, world, self.precision)
        self.train_step = TrainingStep(
            recipe,
            world,
            self.precision,
            self.model,
            build_objective(
                recipe.objective, recipe.model.distilled, d, kernels="distillation_loss" in self.kernels.ops
            ),
            num_classes=self.num_classes,
            steps_per_epoch=self.data.steps,
            teacher=self.teacher,
            labels=self.labels,
        )
        # On a GPU what a step leaves is looked at while the next one runs, so that the GPU never waits for the host.
        self.deferred = world.device.type == "cuda" and run.loss_sync == "deferred"
        self.profiler = self._open_profiler()
        self.epoch, self.step, self.global_step = 0, 0, 0
        self.counted_from = START
        self.last_scores: dict[str, Scores] = {}

    def _open_profiler(self) -> StepProfiler | None:
        run, most = self.recipe.run, room(self.data.steps, self.recipe.run.epochs)
        if run.profile > most:
            raise UserError(
                f"run.profile {run.profile}: {run.epochs} epochs of {self.data.steps} steps have room for {most} steps "
                f"of one epoch once the run is warm: ask for fewer, or for a longer run"
            )
        if not (run.profile and self.world.main):
            return None
        return StepProfiler(self.folder, run.profile, run.global_batch // self.world.size, self.world.device)

    def _open_labels(self) -> LabelCache | None:
        """The teacher's labels where they were made beforehand."""
        folder, kind = self.recipe.teacher.labels, self.recipe.objective.distillation
        if folder is None or kind == "none":
            return None
        labels = LabelCache(folder)
        labels.check(pixel_key(self.recipe, self.data))
        described = labels.described
        if (described.kind, described.num_classes) != (kind, self.num_classes):
            raise UserError(
                f"{folder} holds {described.kind} labels of {described.num_classes} classes, the run distils {kind} "
                f"with {self.num_classes}: make others with fastdeit-label"
            )
        cfg = self.recipe.teacher
        if (cfg.checkpoint is not None or cfg.name == LITE0) and self.world.main:
            teacher = self._load_teacher()
            if teacher.fingerprint != described.teacher:
                raise UserError(
                    f"{folder} holds labels of another teacher ({described.teacher_name}) than {teacher.source}: leave "
                    f"out --teacher.name and --teacher.checkpoint, or make other labels with fastdeit-label"
                )
        return labels

    def _build_teacher(self) -> Teacher | None:
        if self.recipe.objective.distillation == "none" or self.labels is not None:
            return None
        teacher = self._load_teacher()
        check_class_names(
            str(self.train_set.path), self.train_set.class_names, f"the teacher {teacher.source}", teacher.class_names
        )
        return teacher.to(self.world.device)

    def _load_teacher(self) -> Teacher:
        augment = self.recipe.augment
        return Teacher(self.recipe.teacher, augment.mean, augment.std, self.recipe.model.img_size, self.num_classes)

    def run(self) -> dict[str, Scores]:
        """Train from where the run stands to its last epoch; the last scores, by kind of weights."""
        run, began = self.recipe.run, time.monotonic()
        try:
            self._start()
            self.train_step.distribute()
            if self.epoch and self.step == 0:
                self._evaluate_if_due()  # a kill may have come between the checkpoint and its evaluation
            meter = Meter(self.world)
            with self.data.batches(self.epoch, self.step) as batches:
                while self.epoch < run.epochs:
                    self._train_epoch(batches, meter)
                    self.epoch, self.step = self.epoch + 1, 0
                    self._save()
                    self._evaluate_if_due()
            seconds = time.monotonic() - began
            if self.profiler is not None:
                self.log.say(
                    f"no profile: the run ended before {run.profile} more steps of one epoch, once it was warm"
                )
            self.log.event("end", epoch=self.epoch, global_step=self.global_step, seconds=round(seconds, 3))
            self.log.say(f"done: {self.epoch} epochs in {duration(seconds)}; {self.folder}")
        finally:
            self.close()
        return self.last_scores

    def close(self) -> None:
        self._stack.close()

    def _start(self) -> None:
        recipe = self.recipe
        resumed = restore(self)
        if self.labels is not None:
            self.labels.check_epochs(self.epoch, recipe.run.epochs)
        if self.world.main:
            write_recipe(self.folder, recipe)
            self.messages = [*self.lock.notes, *self.messages]
        parameters = sum(p.numel() for p in self.model.parameters())
        self.log.event(
            "start",
            recipe=recipe.to_dict(),
            fastdeit=__version__,
            torch=torch.__version__,
            world=self.world.size,
            device=str(self.world.device),
            precision=self.precision.name,
            compiled=self.train_step.compiled,
            cuda_graphs=self.train_step.graphs[0],
            kernels=self.kernels.event(),
            optimizer=f"{recipe.optim.implementation} {recipe.optim.name}",
            loader=self.data.loader.name,
            stage=self.data.stage.name,
            steps_per_epoch=self.data.steps,
            parameters=parameters,
            peak_lr=peak_lr(recipe.optim, recipe.run.global_batch),
        )
        for message in self.messages:
            self.log.say(message)
        if self.precision.note:
            self.log.say(self.precision.note)
        self.log.say(
            f"{recipe.name}: {parameters / 1e6:.1f} M parameters, {self.num_classes} classes, "
            f"{len(self.train_set)} images, {self.data.steps} steps of {recipe.run.global_batch} an epoch, "
            f"{self.precision.name} on {self.world.size} x {self.world.device.type}"
            f"{', compiled (the first steps take minutes)' if self.train_step.compiled else ''}"
        )
        self.log.say(lr_sentence(recipe))
        if (mode := mode_sentence(recipe)) is not None:
            self.log.say(mode)
        if self.world.device.type == "cuda":
            replayed, why = self.train_step.graphs
            self.log.say(f"CUDA graphs {'on' if replayed else 'off'}: {why}")
        self.log.say(self.kernels.sentence())
        self.log.say(f"loader {self.data.loader.name}: {self.data.loader.reason}")
        self.log.say(f"augmentation on the {self.data.stage.name}: {self.data.stage.reason}")
        for data_set in (self.train_set, *([self.val.loader.dataset] if self.val is not None else [])):
            without = unchecked(data_set.path, data_set.checksums)
            if without is not None:
                self.log.say(without)
        if self.labels is not None:
            described = self.labels.described
            self.log.say(f"{described.kind} labels of teacher {described.teacher_name} from {self.labels.folder}")
        if self.data.repeats != recipe.data.repeats:
            self.log.say("repeated augmentation is dropped on one process, as the released code does")
        for warning in self.warnings:
            self.log.warn(warning)
        if resumed is not None:
            path, changed = resumed
            at = {"epoch": self.epoch, "step": self.step, "global_step": self.global_step}
            self.log.event("resume", path=str(path), changed=changed, **at)
            self.log.say(f"resumed from {path}: epoch {self.epoch + 1}, step {self.step}")
            for phrase in changed:
                self.log.say(f"changed on resuming: {phrase}")

    def _train_epoch(self, batches: Prefetcher[TrainBatch], meter: Meter) -> None:
        run = self.recipe.run
        self.train_step.student.train(not frozen_mode(self.recipe))
        meter.start(batches.wait_seconds)
        self.log.progress.start_epoch(self.epoch, run.epochs, self.data.steps, self.step)
        fallbacks: set[int] = set()
        replaced: set[tuple[int, int]] = set()
        looks: list[Callable[[], None]] = []
        while self.step < self.data.steps:
            batch = next(batches)
            fallbacks.update(batch.fallbacks)
            replaced.update(batch.replaced)
            check = None if self.deferred else self._check(batch)
            parts = self.train_step(batch, self.epoch, self.step, self.global_step, check)
            _look(looks)
            if self.deferred:
                looks.append(self._check_late(parts, batch))
            meter.add(parts)
            self.step += 1
            self.global_step += 1
            if self.global_step % run.log_every == 0 or self.step == self.data.steps:
                looks.append(self._train_line(meter, batches.wait_seconds))
            saving = run.checkpoint_every and self.global_step % run.checkpoint_every == 0
            if not self.deferred or saving or self.step == self.data.steps:
                _look(looks)
            self.log.progress.advance()
            if self.profiler is not None:
                self._profile(self.profiler, batches.wait_seconds)
            if saving:
                self._save()
        meter.stop(batches.wait_seconds)
        self.log.progress.end_epoch()
        counts = self.world.sum(torch.tensor([len(fallbacks), len(replaced)], device=self.world.device)).tolist()
        report_images(self.log, self.epoch, self.data.loader.name, counts, sorted(fallbacks), sorted(replaced))

    def _check(self, batch: TrainBatch) -> Callable[[LossParts], None]:
        """Looks at the losses of the coming step before the weights move."""

        def check(parts: LossParts) -> None:
            loss = float(parts.loss)
            check_loss(self, loss, batch, self.step, updated=False)
            self.log.progress.loss(loss)

        return check

    def _check_late(self, parts: LossParts, batch: TrainBatch) -> Callable[[], None]:
        """Looks at the losses of the step that was just given to the device."""
        loss, step = OnItsWay(parts.loss[None]), self.step

        def check() -> None:
            (arrived,) = loss.tolist()
            check_loss(self, arrived, batch, step, updated=True)
            self.log.progress.loss(arrived)

        return check

    def _profile(self, profiler: StepProfiler, waited: float) -> None:
        found = profiler.step(self.data.steps - self.step, waited)
        if found is not None:
            self.profiler = None
            parts = {name: round(1e3 * seconds / found.steps, 4) for name, seconds in found.groups().items()}
            self.log.event("profile", global_step=self.global_step, steps=found.steps, milliseconds=parts)
            shown = ", ".join(f"{name} {100 * seconds / found.wall:.0f}%" for name, seconds in found.groups().items())
            self.log.say(f"profile of {found.steps} steps in {self.folder}/profile.md and profile.json.gz: {shown}")

    def _train_line(self, meter: Meter, wait_seconds: float) -> Callable[[], None]:
        """Logs the steps since the last such line."""
        run, window = self.recipe.run, meter.read(wait_seconds, self.recipe.run.global_batch)
        eta = (run.epochs * self.data.steps - self.global_step) * run.global_batch / window.images_per_second
        at = {"epoch": self.epoch, "step": self.step - 1, "global_step": self.global_step, "lr": self.train_step.lr}
        return lambda: report_window(self.log, window, eta, at)

    def _evaluate_if_due(self) -> None:
        run = self.recipe.run
        if self.val is None or (self.epoch % run.eval_every and self.epoch != run.epochs):
            return
        kinds: dict[str, dict[str, torch.Tensor] | None] = {"model": None}
        ema = self.train_step.ema
        if ema is not None and self.recipe.departures.ema_eval:
            kinds["ema"] = ema.shadow
        for kind, weights in kinds.items():
            plain: dict[str, torch.Tensor] | None = None
            if weights is not None:
                plain = {name: value.clone() for name, value in self.model.state_dict().items()}
                self.model.load_state_dict(weights)
            # Running statistics of a convnet differ by process; a checkpoint holds the main one's.
            self.world.broadcast(self.model.buffers())
            scores = evaluate(
                self.model,
                self.val,
                self.world,
                self.precision,
                kernels="evaluate_heads" in self.kernels.ops,
                progress=run.progress and self.world.main,
            )
            if plain is not None:
                self.model.load_state_dict(plain)
            self.last_scores[kind] = scores
            self.log.event("eval", epoch=self.epoch - 1, global_step=self.global_step, weights=kind, **scores)
        shown = "  ".join(
            f"{kind} {headline(s, self.recipe.departures.late_fusion):.2f}%" for kind, s in self.last_scores.items()
        )
        self.log.say(f"epoch {self.epoch}: top-1 {shown}")

    def _save(self) -> None:
        check_weights(self)
        if self.world.main:
            path = checkpoint.step_path(self.folder / "checkpoints", self.global_step)
            checkpoint.save(path, snapshot(self))
            checkpoint.prune(path.parent, self.recipe.run.keep_checkpoints)
            self.log.event(
                "checkpoint",
                path=str(path),
                epoch=self.epoch,
                step=self.step,
                global_step=self.global_step,
            )
        self.world.barrier()


def _look(looks: list[Callable[[], None]]) -> None:
    for look in looks:
        look()
    looks.clear()
