"""`adapt fit`: one run from recipe to export. Stages are its only notion of training; a stage is one Lightning fit."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adapt.config import Resolved
from adapt.config.schema import Recipe
from adapt.console import PrintableFormatter, printable
from adapt.conversion.base import planned_tokenizer
from adapt.distributed import checkpoint, healthy
from adapt.distributed import world as worlds
from adapt.distributed.saver import Saver
from adapt.distributed.world import World
from adapt.errors import UserError
from adapt.optim.following import Following
from adapt.optim.suite import Suite, adopt
from adapt.runfolder import RunFolder
from adapt.train import interpolate, start_values
from adapt.train.build import build_root, compute_dtype, facts_of, set_trainable
from adapt.train.deterministic import deterministic, prepare
from adapt.train.finish import finish
from adapt.train.frozen_rows import FrozenRows
from adapt.train.hooks import Hooks
from adapt.train.measure import measure
from adapt.train.mixing import total_steps
from adapt.train.module import Stage, train
from adapt.train.outcome import outcome
from adapt.train.probe import dry_run, leak_probe
from adapt.train.progress import duration
from adapt.train.rules import learners
from adapt.train.signals import StopFlag, stop_point
from adapt.train.state import State
from adapt.train.teacher import build_teacher


def fit(resolved: Resolved, resume: str = "no", flag: StopFlag | None = None) -> int:
    """Train, evaluate, export and report. Returns the exit code 0 (of arms, one that failed may have left another);
    raises UserError (2), StopRequested (75) or RankLost (71). `flag`: one that has the signals already."""
    from adapt.train.arms import BEGAN, fit_arms
    from adapt.train.validate import check_or_raise

    if resolved.arms:
        return fit_arms(resolved, resume)
    began = float(os.environ.get(BEGAN, time.monotonic()))
    with ExitStack() as stack:
        flag = flag or stack.enter_context(StopFlag())
        with flag.at_once(UNSAVED):
            check_or_raise(resolved)
            _quiet()
        trainer = resolved.recipe.trainer
        prepare(trainer.deterministic)
        world = worlds.start(trainer.devices, trainer.timeout, flag, trainer.start_timeout)
        stack.callback(worlds.stop)
        if not world.main:  # what rank 0 says of the run is enough
            logging.getLogger("adapt").setLevel(logging.WARNING)
        with worlds.naming_the_lost(world.watch):
            folder = worlds.on_main(world, partial(_take, resolved, resume), flag) or RunFolder.follow(resolved, resume)
        with outcome(folder, world), deterministic(trainer.deterministic), Saver(world) as saver:
            _Run(resolved, folder, world, flag, began, saver).go()
    return 0


UNSAVED = "before the first step; there was nothing to save"


def _take(resolved: Resolved, resume: str) -> RunFolder:
    """A folder that is there is taken now: its data may take a while to prepare."""
    folder = RunFolder.create(resolved, resume)
    if folder.resumed:
        folder.claim()
    return folder


class _Run:
    """The objects of one run that live across its stages."""

    def __init__(self, resolved: Resolved, folder: RunFolder, world: World, flag: StopFlag, began: float, saver: Saver):
        self.saver = saver
        self.resolved, self.folder, self.world, self.flag, self.began = resolved, folder, world, flag, began
        self.state, self.loggers = State(), []
        with self._unsaved(UNSAVED):
            self._build()
            self._begin()

    def _build(self) -> None:
        recipe, world = self.resolved.recipe, self.world
        self.tokenizer = worlds.on_main(world, lambda: planned_tokenizer(recipe), self.flag)
        self.tokenizer = self.tokenizer or planned_tokenizer(recipe)
        self.data, self.data_of = self._prepare(recipe), recipe.data
        self.resume_from = self._newest()
        self.decided = _decided(self.resume_from)
        self.root, self.teacher_of = build_root(recipe, self.tokenizer, world, self.decided), None
        self.facts = facts_of(recipe, self.root.student, self.tokenizer)

    def _begin(self) -> None:
        """The run folder, and where the run stands in it."""
        folder, world = self.folder, self.world

        def begin() -> int:
            folder.begin(self.resolved)  # nothing is left behind by a start that failed before this
            return folder.attempt.generation

        (generation,) = world.sum([worlds.on_main(world, begin) or 0])
        folder.follow_attempt(generation)
        if self.resume_from:
            self.state = State.from_dict(checkpoint.read_state(self.resume_from))
            if self.state.stage >= (stages := len(self.resolved.stages)):
                raise UserError(f"{self.resume_from} is of stage {self.state.stage + 1}; this recipe has {stages}")
        self.state.decided = self.decided
        if world.main:
            from adapt.train.loggers import build_loggers

            folder.attempt.begin_at(self.state.step)
            self.loggers = build_loggers(self.resolved.recipe, folder.path, self.state.step if folder.resumed else 0)
        for where, answer in self.decided.items():
            self.say(f"{where}: {answer['text']}")

    @contextmanager
    def _unsaved(self, where: str) -> Iterator[None]:
        """Work of every rank with nothing to save: one process is cut off at once, several agree when it is done (and
        the watch ends them where that takes too long)."""
        self.world.at("start", self.state.step)
        with self.flag.at_once(where) if self.world.size == 1 else nullcontext():
            yield
        stop_point(self.flag, self.world, where)

    def _newest(self) -> Path | None:
        """The checkpoint to go on from. Collective."""
        if not worlds.from_main(self.folder.resumed):
            return None
        worlds.on_main(self.world, lambda: checkpoint.recover(self.folder.checkpoints))
        return healthy.take_newest(self.folder.checkpoints, self.world, self.say)

    def _prepare(self, recipe: Recipe):
        """Rank 0 prepares the shards, the others find them ready."""
        from adapt.data.prepare import prepare

        data = worlds.on_main(self.world, lambda: prepare(recipe, self.tokenizer, progress=True), self.flag)
        return data or prepare(recipe, self.tokenizer, progress=False)

    def go(self) -> None:
        with self._unsaved(f"before step {self.state.step + 1}; there was nothing to save"):
            leak_probe(self.root, self.facts.attention, self.root.student.config.vocab_size, self.world)
        stages, state = self.resolved.stages, self.state
        last = len(stages) - 1
        if state.finished == "steps" and total_steps(stages[last]) > state.stage_step:
            more = total_steps(stages[last]) - state.stage_step
            self.say(f"{more} steps were added to the finished run; its schedule now spans all of them")
            state.finished = ""
        if state.finished:
            self.say(f"all {len(stages)} stage(s) were done before; exporting again")
            checkpoint.load(self.resume_from, self.root, None, verify=False)
        hooks = None
        while not state.finished:
            hooks = self._stage(stages[state.stage], hooks.optimizer if hooks else None, last=state.stage == last)
        self.world.at("end")
        finish(self, stages[last])

    def _stage(self, recipe: Recipe, before: torch.optim.Optimizer | None, *, last: bool) -> Hooks:
        state = self.state
        with self._unsaved(f"before step {state.step + 1}; there was nothing to save"):
            module, feed = self._make(recipe, before)
        hooks, total = module.hooks, feed.steps
        if state.step == 0 and "before" not in state.results:
            state.results["before"] = hooks.evaluate()
            hooks.ended_by_rule = ""  # a rule that the start meets already ends nothing before the first step
        elif state.owes_evaluation and state.stage_step < total:
            hooks.evaluate()
        self.resume_from = None
        if state.stage_step < total and not hooks.ended_by_rule:
            train(module)
        if hooks.progress:
            hooks.progress.finish()
        if hooks.ended_by_rule:
            hooks.note(f"stopped early: {hooks.ended_by_rule}")
        elif state.stage_step < total:
            hooks.save()
            raise self.flag.requested(f"after step {state.step}; checkpoint saved")
        if last:
            state.results["after"] = hooks.evaluate()
            state.finished = "rule" if hooks.ended_by_rule else "data" if feed.ends_early else "steps"
        else:
            if recipe.evaluation.every:
                hooks.evaluate()
            stream, rows = feed.stream, module.rows_per_step
            state.read = stream.plan.counts((state.stage_step + state.skipped) * rows // stream.unit)
            state.stage, state.stage_step, state.skipped = state.stage + 1, 0, 0
            state.minima, state.objective, state.best, state.best_step, state.start_values = {}, {}, None, None, ""
            state.norms = []
        hooks.saved_step = -1
        hooks.save()
        return hooks

    def _make(self, recipe: Recipe, before: torch.optim.Optimizer | None) -> tuple[Stage, Any]:
        """Everything of a stage up to its first step: (its module, its feed)."""
        from adapt.train.feed import feed_of
        from adapt.train.progress import Progress

        state, world = self.state, self.world
        trainable = set_trainable(self.root, recipe.trainable)
        self.facts = facts_of(recipe, self.root.student, self.tokenizer)
        self.teach(recipe)
        objective = recipe.objective.build(replace(self.facts, total_steps=total_steps(recipe)))
        if state.objective:
            objective.restore(state.objective)
        self.root.student.config.update(objective.export_fields())  # what samplers need to know
        optimizer = recipe.optimizer.build(self.root.student)
        if isinstance(optimizer, Suite):
            self.say(f"optimizer {recipe.optimizer.name}:\n{optimizer.table()}")
        following = Following(optimizer, recipe)
        frozen = FrozenRows(self.root.student, recipe.trainable)
        frozen.guard(optimizer)
        if recipe.optimizer_state == "keep" and before is not None:  # the groups (lr, decay) are this stage's own
            adopt(optimizer, before)
        if self.resume_from:
            afresh = state.stage_step == 0 and recipe.optimizer_state == "reset"  # it holds the stage before's moments
            checkpoint.load(self.resume_from, self.root, None if afresh else optimizer, verify=False)
        if recipe.data != self.data_of:
            self.data, self.data_of = self._prepare(recipe), recipe.data
        rows_per_step = self._rows_per_step(recipe)
        feed = feed_of(recipe, self.data.train, state, rows_per_step)
        if world.main:
            self.folder.add_data(feed.add_to(self.data.manifest))
        progress = None
        if world.main:
            progress = Progress(
                total_steps=feed.steps,
                start_step=state.stage_step,
                tokens_per_step=recipe.trainer.batch_tokens,
                offset=state.step - state.stage_step,
            )
        hooks = Hooks(
            recipe=recipe,
            folder=self.folder,
            state=state,
            world=world,
            flag=self.flag,
            root=self.root,
            optimizer=optimizer,
            measure=lambda: measure(self, recipe, objective),
            observe=objective.observe,
            loggers=self.loggers,
            progress=progress,
            began=self.began,
            saver=self.saver,
        )
        if self.resume_from:
            hooks.saved_step = state.step
        if recipe.export.interpolation is not None:
            interpolate.keep_start(self.folder, state.step, self.root, world)
        if compares := recipe.objective.declares("compares_with_start"):
            objective.remember(start_values.nothing)
        microbatch = self._rehearse(recipe, objective, feed, rows_per_step, trainable, progress)
        if compares:
            start_values.begin(
                recipe,
                objective,
                state,
                feed.stream,
                feed.steps,
                root=self.root,
                microbatch=microbatch,
                world=world,
                hooks=hooks,
            )
        module = Stage(
            root=self.root,
            objective=objective,
            optimizer=optimizer,
            frozen=frozen,
            following=following,
            stream=feed.stream,
            recipe=recipe,
            state=state,
            world=world,
            microbatch=microbatch,
            total_steps=feed.steps,
            flag=self.flag,
            hooks=hooks,
        )
        return module, feed

    def teach(self, recipe: Recipe) -> None:
        """The teacher of this stage; one that the stage before had is used again."""
        wanted = recipe.teacher if learners(recipe) else None
        if wanted != self.teacher_of:
            self.root.teach(None)  # the old one's memory first
            self.root.teach(build_teacher(recipe, self.tokenizer, self.world))
            self.teacher_of = wanted

    def _rows_per_step(self, recipe: Recipe) -> int:
        rows, extra = divmod(recipe.trainer.batch_tokens, recipe.data.seq_len)
        if extra or rows % self.world.size:
            step = recipe.data.seq_len * self.world.size
            better = max(1, round(recipe.trainer.batch_tokens / step)) * step
            raise UserError(
                f"trainer.batch_tokens={recipe.trainer.batch_tokens:,} is not a multiple of {self.world.size} rank(s) "
                f"x {recipe.data.seq_len:,} tokens a row; try {better:,}"
            )
        return rows

    def _rehearse(self, recipe, objective, feed, rows_per_step, trainable, progress) -> int:
        """The dry run, and the header that says what is about to happen and how long it should take."""
        world = self.world
        first = feed.stream.step_batch(0, rows_per_step, world.rank, world.size)
        wanted = recipe.trainer.microbatch
        size, took = dry_run(
            self.root,
            objective,
            first,
            microbatch=wanted,
            seed=recipe.run.seed,
            world=world,
            unit=feed.stream.unit,
        )
        if progress:
            steps = feed.steps - self.state.stage_step
            estimate = steps * took * first.num_rows / size
            progress.header(
                {
                    "run": str(self.folder.path),
                    "stage": f"{self.resolved.names[self.state.stage]} ({self.state.stage + 1} of "
                    f"{len(self.resolved.stages)})",
                    "model": f"{recipe.model.base}, {trainable:,} trainable parameters",
                    "objective": recipe.objective.name,
                    "compute": f"{world.size} x {world.device.type}, {compute_dtype(recipe, world)}, "
                    f"microbatch {size} of {first.num_rows} row(s)"
                    + (" (chosen by trainer.microbatch=auto)" if wanted == "auto" else ""),
                    "steps": f"{steps} of {recipe.trainer.batch_tokens:,} tokens, "
                    f"{stream_tokens(self.data):,} training tokens at hand",
                    **{f"  {label}": read for label, read in feed.reads.items()},
                    "estimate": f"at most about {duration(estimate)} of training",
                }
            )
            for note in feed.notes:
                self.say(note)
        return size

    def say(self, text: str) -> None:
        if self.world.main:
            self.folder.log(text)
            print(printable(text))


def _decided(saved: Path | None) -> dict[str, Any]:
    """What the conversions of a run that goes on found when it began; {} before its first checkpoint."""
    return worlds.from_main(checkpoint.read_state(saved).get("decided", {}) if saved else {})


def stream_tokens(data) -> int:
    return sum(shards.num_tokens for shards in data.train)


def _quiet() -> None:
    """Lightning's advice on loaders and devices is not for our users, nor are transformers' bars of loaded tensors."""
    import lightning.pytorch  # noqa: F401  (sets its log level on import, so it comes first)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("adapt").setLevel(logging.INFO)
