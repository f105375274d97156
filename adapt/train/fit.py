"""`adapt fit`: one run from recipe to export. Stages are its only notion of training; a stage is one Lightning fit."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from adapt.config import Resolved
from adapt.config.schema import Recipe
from adapt.conversion.base import planned_tokenizer
from adapt.distributed import checkpoint
from adapt.distributed import world as worlds
from adapt.distributed.world import World
from adapt.errors import StopRequested, UserError
from adapt.optim.following import Following
from adapt.optim.suite import Suite, adopt
from adapt.runfolder import RunFolder
from adapt.train import interpolate, start_values
from adapt.train.build import build_root, compute_dtype, facts_of, set_trainable
from adapt.train.deterministic import deterministic, prepare
from adapt.train.finish import finish
from adapt.train.frozen_rows import FrozenRows
from adapt.train.hooks import Hooks
from adapt.train.mixing import total_steps
from adapt.train.probe import dry_run, leak_probe, out_of_memory
from adapt.train.progress import duration
from adapt.train.root import look
from adapt.train.rules import learners
from adapt.train.signals import StopFlag
from adapt.train.state import State
from adapt.train.teacher import base_model, build_teacher


def fit(resolved: Resolved, resume: str = "no") -> int:
    """Train, evaluate, export and report. Returns the exit code 0 (of arms, one that failed may have left another);
    raises UserError (2) or StopRequested (75)."""
    from adapt.train.arms import BEGAN, fit_arms
    from adapt.train.validate import check_or_raise

    if resolved.arms:
        return fit_arms(resolved, resume)
    began = float(os.environ.get(BEGAN, time.monotonic()))
    check_or_raise(resolved)
    _quiet()
    exact = resolved.recipe.trainer.deterministic
    prepare(exact)
    world = worlds.start(resolved.recipe.trainer.devices)
    try:
        folder = worlds.on_main(world, lambda: RunFolder.create(resolved, resume))
        folder = folder or RunFolder.follow(resolved, resume)
        with StopFlag() as flag, deterministic(exact):
            _Run(resolved, folder, world, flag, began).go()
    finally:
        worlds.stop()
    return 0


class _Run:
    """The objects of one run that live across its stages."""

    def __init__(self, resolved: Resolved, folder: RunFolder, world: World, flag: StopFlag, began: float):
        self.resolved, self.folder, self.world, self.flag, self.began = resolved, folder, world, flag, began
        recipe = resolved.recipe
        self.tokenizer = worlds.on_main(world, lambda: planned_tokenizer(recipe)) or planned_tokenizer(recipe)
        self.data, self.data_of = self._prepare(recipe), recipe.data
        decided = _decided(folder)
        self.root, self.teacher_of = build_root(recipe, self.tokenizer, world, decided), None
        self.facts = facts_of(recipe, self.root.student, self.tokenizer)
        self.state = State()
        if world.main:
            folder.begin(resolved)  # nothing is left behind by a start that failed before this
            checkpoint.recover(folder.checkpoints)
        world.barrier()
        saved = checkpoint.checkpoints(folder.checkpoints)
        self.resume_from = saved[-1] if folder.resumed and saved else None
        if self.resume_from:
            self.state = State.from_dict(checkpoint.read_state(self.resume_from))
        self.state.decided = decided
        self.loggers: list[Any] = []
        if world.main:
            from adapt.train.loggers import build_loggers

            self.loggers = build_loggers(recipe, folder.path, self.state.step if folder.resumed else 0)
        for where, answer in decided.items():
            self.say(f"{where}: {answer['text']}")

    def _prepare(self, recipe: Recipe):
        """Rank 0 prepares the shards, the others find them ready."""
        from adapt.data.prepare import prepare

        data = worlds.on_main(self.world, lambda: prepare(recipe, self.tokenizer, progress=True))
        return data or prepare(recipe, self.tokenizer, progress=False)

    def go(self) -> None:
        leak_probe(self.root, self.facts.attention, self.root.student.config.vocab_size, self.world)
        stages, state = self.resolved.stages, self.state
        last = len(stages) - 1
        if state.finished == "steps" and total_steps(stages[last]) > state.stage_step:
            more = total_steps(stages[last]) - state.stage_step
            self.say(f"{more} steps were added to the finished run; its schedule now spans all of them")
            state.finished = ""
        if state.finished:
            self.say(f"all {len(stages)} stage(s) were done before; exporting again")
            checkpoint.load(self.resume_from, self.root, None)
        hooks = None
        while not state.finished:
            hooks = self._stage(stages[state.stage], hooks.optimizer if hooks else None, last=state.stage == last)
        finish(self, stages[last])

    def _stage(self, recipe: Recipe, before: torch.optim.Optimizer | None, *, last: bool) -> Hooks:
        import lightning.pytorch as L

        from adapt.train.feed import feed_of
        from adapt.train.module import Stage
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
            checkpoint.load(self.resume_from, self.root, None if afresh else optimizer)
        if recipe.data != self.data_of:
            self.data, self.data_of = self._prepare(recipe), recipe.data
        rows_per_step = self._rows_per_step(recipe)
        feed = feed_of(recipe, self.data.train, state, rows_per_step)
        if world.main:
            self.folder.add_data(feed.add_to(self.data.manifest))
        stream, total = feed.stream, feed.steps
        progress = None
        if world.main:
            progress = Progress(
                total_steps=total,
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
            measure=lambda: self.measure(recipe, objective),
            observe=objective.observe,
            loggers=self.loggers,
            progress=progress,
            began=self.began,
        )
        if self.resume_from:
            hooks.saved_step = state.step
        if recipe.export.interpolation is not None:
            interpolate.keep_start(self.folder.checkpoints, state.step, self.root, world)
        if compares := recipe.objective.declares("compares_with_start"):
            objective.remember(start_values.nothing)
        microbatch = self._rehearse(recipe, objective, feed, rows_per_step, trainable, progress)
        if compares:
            start_values.begin(
                recipe, objective, state, stream, total, root=self.root, microbatch=microbatch, world=world, hooks=hooks
            )
        if state.step == 0 and "before" not in state.results:
            state.results["before"] = hooks.evaluate()
            hooks.ended_by_rule = ""  # a rule that the start meets already ends nothing before the first step
        self.resume_from = None
        module = Stage(
            root=self.root,
            objective=objective,
            optimizer=optimizer,
            frozen=frozen,
            following=following,
            stream=stream,
            recipe=recipe,
            state=state,
            world=world,
            microbatch=microbatch,
            total_steps=total,
            flag=self.flag,
            hooks=hooks,
        )
        if state.stage_step < total:
            trainer = L.Trainer(
                **_lightning_world(world),
                max_epochs=1,
                max_steps=-1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                num_sanity_val_steps=0,
                plugins=[],
            )
            try:
                trainer.fit(module)
            except torch.OutOfMemoryError:
                raise UserError(out_of_memory(microbatch, recipe.data.seq_len)) from None
        if progress:
            progress.finish()
        if hooks.ended_by_rule:
            hooks.note(f"stopped early: {hooks.ended_by_rule}")
        elif state.stage_step < total:
            hooks.save()
            reason = self.flag.reason or "another rank was asked to stop"
            raise StopRequested(
                f"stopped on request ({reason}) after step {state.step}; checkpoint saved. Go on with --resume."
            )
        if last:
            state.results["after"] = hooks.evaluate()
            state.finished = "rule" if hooks.ended_by_rule else "data" if feed.ends_early else "steps"
        else:
            state.read = stream.plan.counts((state.stage_step + state.skipped) * rows_per_step // stream.unit)
            state.stage, state.stage_step, state.skipped = state.stage + 1, 0, 0
            state.minima, state.objective, state.best, state.best_step, state.start_values = {}, {}, None, None, ""
        hooks.saved_step = -1
        hooks.save()
        return hooks

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

    def measure(self, recipe: Recipe, objective) -> dict[str, float]:
        from adapt.data.stream import eval_passes
        from adapt.evaluate.context import EvalContext, guard_labels
        from adapt.evaluate.runner import evaluate
        from adapt.generation.contract import Contract

        world = self.world
        data, shards = recipe.data, self.data.eval
        sets, pairs = eval_passes(shards, data.seq_len, recipe.evaluation.limit, world.rank, world.size)

        def reduce(values: dict[str, float]) -> dict[str, float]:
            return dict(zip(values, world.sum([float(v) for v in values.values()]), strict=True))

        context = EvalContext(
            call=partial(look, self.root),
            tokenizer=self.tokenizer,
            eval_sets=sets,
            pair_sets=pairs,
            reduce=reduce,
            keep=lambda grid: self.folder.add_grid(self.state.step, grid.to_dict()),
            facts=self.facts,
            contract=Contract.of(objective.export_fields()),
            guards=tuple(label for label in guard_labels(data, list(shards)) if label in sets),
            start=self.state.results.get("before") or ({} if self.state.step == 0 else None),
            base=partial(base_model, recipe, self.tokenizer, world, self.root.teacher),
            measured=self.state.measured,
            device=world.device,
            seed=recipe.run.seed,
        )
        return evaluate(recipe.evaluation.suites, context)

    def say(self, text: str) -> None:
        if self.world.main:
            self.folder.log(text)
            print(text)


def _decided(folder: RunFolder) -> dict[str, Any]:
    """What the conversions of a run that goes on found when it began; {} before its first checkpoint."""
    saved = checkpoint.checkpoints(folder.checkpoints) if folder.resumed else []
    return worlds.from_main(checkpoint.read_state(saved[-1]).get("decided", {}) if saved else {})


def stream_tokens(data) -> int:
    return sum(shards.num_tokens for shards in data.train)


def _lightning_world(world: World) -> dict[str, Any]:
    """The processes exist already (world.py), so Lightning finds them as it finds torchrun's."""
    kind = "gpu" if world.device.type == "cuda" else "cpu"
    if not world.grouped:
        return {"accelerator": kind, "devices": 1}
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=world.size, tensor_parallel_size=1)
    strategy.cluster_environment = TorchElasticEnvironment()
    return {
        "accelerator": kind,
        "devices": world.local_size,
        "num_nodes": world.size // world.local_size,
        "strategy": strategy,
    }


def _quiet() -> None:
    """Lightning's advice on loaders and devices is not for our users, nor are transformers' bars of loaded tensors."""
    import lightning.pytorch  # noqa: F401  (sets its log level on import, so it comes first)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # checkpoints of a single process
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("adapt").setLevel(logging.INFO)
