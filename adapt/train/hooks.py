"""What happens around steps: evaluation, best and stop rules, checkpoints, the time limit, the non-finite policy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from adapt.config.schema import Recipe
from adapt.distributed import checkpoint, healthy
from adapt.distributed.saver import Saver
from adapt.distributed.world import World
from adapt.errors import Problem, StopRequested, UserError
from adapt.optim.suite import restart
from adapt.runfolder import RunFolder
from adapt.train.progress import Progress
from adapt.train.signals import StopFlag
from adapt.train.state import State


class Hooks:
    """Bound to one stage of one run; the Lightning module calls it, and `fit` at the start and the end."""

    def __init__(
        self,
        *,
        recipe: Recipe,
        folder: RunFolder,
        state: State,
        world: World,
        flag: StopFlag,
        root: nn.Module,
        optimizer: torch.optim.Optimizer,
        measure: Callable[[], dict[str, float]],
        observe: Callable[[dict[str, float]], dict[str, float]],
        loggers: list[Any],
        progress: Progress | None,
        began: float,
        saver: Saver,
    ):
        """`began`: when the process took up the run, on the monotonic clock; `trainer.max_time` counts from there."""
        self.recipe, self.folder, self.state, self.world, self.flag = recipe, folder, state, world, flag
        self.root, self.optimizer, self.measure, self.observe = root, optimizer, measure, observe
        self.loggers, self.progress = loggers, progress
        self.deadline = began + seconds(recipe.trainer.max_time) if recipe.trainer.max_time else math.inf
        self.saver, self.saved_step, self.saved_at = saver, -1, time.monotonic()
        self.ended_by_rule = ""

    def log(self, values: dict[str, float]) -> None:
        if not self.world.main:
            return
        self.folder.guard()
        for logger in self.loggers:
            logger.log_metrics(values, step=self.state.step)
        if self.progress:
            self.progress.update(self.state.step, values)

    def fact(self, values: dict[str, Any]) -> None:
        """What is told once, as a line of its own in the metrics."""
        if self.world.main:
            self.folder.guard()
            for logger in self.loggers:
                logger.log_metrics(values, step=self.state.step)

    def note(self, text: str) -> None:
        if self.world.main:
            self.folder.log(text)
            if self.progress:
                self.progress.note(text)

    def wants_stop(self) -> bool:
        """Whether this rank was asked to stop, or its time is up; the ranks agree on it within the step."""
        if time.monotonic() > self.deadline and not self.flag.reason:
            self.flag.reason = f"trainer.max_time={self.recipe.trainer.max_time}"
        return bool(self.flag.reason)

    def wants_save(self) -> bool:
        """Whether this rank's clock says so (or has seen a save fail); the ranks agree on it within the step."""
        minutes = self.recipe.checkpoint.every_minutes
        return self.saver.failed or (minutes is not None and time.monotonic() > self.saved_at + 60 * minutes)

    def after_step(self, stage: Any, *, save: bool) -> None:
        recipe, state = self.recipe, self.state
        if self.folder.attempt is not None:
            self.folder.attempt.step = state.step
        last = state.stage_step >= stage.total_steps
        if recipe.evaluation.every and state.stage_step % recipe.evaluation.every == 0 and not last:
            self.evaluate()
            if self.ended_by_rule:
                stage.trainer.should_stop = True
        every = recipe.checkpoint.every
        if (save or (every and state.stage_step % every == 0)) and not last:
            self.save(wait=not recipe.checkpoint.asynchronous)
        self._tell_saved()

    def evaluate(self) -> dict[str, float]:
        """Run the suites, log them, keep the best, apply the stop rules. Collective."""
        if not self.recipe.evaluation.suites:
            return {}
        self.world.at("evaluation", self.state.step)
        self.state.owes_evaluation = True
        started = time.monotonic()
        self.root.eval()
        try:
            results = self.measure()
        except StopRequested:
            self.root.train()
            self.save()
            raise
        self.root.train()
        self.state.owes_evaluation = False
        if self.progress:
            self.progress.leave_out(time.monotonic() - started)
        self.state.objective = self.observe(results)
        state = self.state
        now = {"stage": state.stage, "tokens": state.tokens, "seconds": state.seconds}
        self.fact({f"eval/{k}": v for k, v in results.items()} | now)
        self.note(f"evaluation at step {self.state.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in results.items()))
        self._keep_best(results)
        self._apply_rules(results)
        return results

    def _keep_best(self, results: dict[str, float]) -> None:
        metric = self.recipe.evaluation.best
        if metric is None:
            return
        self._require("evaluation.best", metric, results)
        if self.state.best is None or results[metric] < self.state.best:
            self.state.best, self.state.best_step = results[metric], self.state.step
            self.save(wait=not self.recipe.checkpoint.asynchronous)

    def _apply_rules(self, results: dict[str, float]) -> None:
        for rule in self.recipe.evaluation.stop:
            self._require("evaluation.stop", rule.metric, results)
            value = results[rule.metric]
            lowest, since = self.state.minima.get(rule.metric, [math.inf, -1])
            self.state.minima[rule.metric] = [value, 0] if value < lowest else [lowest, since + 1]
            because = (
                f"above {rule.above}"
                if rule.above is not None and value > rule.above
                else f"below {rule.below}"
                if rule.below is not None and value < rule.below
                else f"no new minimum for {rule.patience} evaluations"
                if rule.patience is not None and self.state.minima[rule.metric][1] >= rule.patience
                else ""
            )
            if because:
                self.ended_by_rule = f"{rule.metric} is {value:.4g}: {because}"

    def _require(self, key: str, metric: str, results: dict[str, float]) -> None:
        if metric not in results:
            raise UserError(
                Problem(key, f"no suite measures {metric!r}; this run measures {', '.join(sorted(results))}")
            )

    def save(self, *, wait: bool = True) -> None:
        """Checkpoint this step (once), then prune. Without `wait`, training may go on before it is there. Collective."""
        if self.saved_step != self.state.step:
            self.world.at("save", self.state.step)
            keep, best = self.recipe.checkpoint.keep, self.state.best_step
            kept = {f"step-{best}"} if best is not None else set()
            self.saver.save(
                self.folder.checkpoints,
                self.state.step,
                self.root,
                self.optimizer,
                self.state.to_dict(),
                attempt=self.folder.attempt,
                wait=wait,
                then=lambda: checkpoint.prune(self.folder.checkpoints, keep, kept),
            )
            self.saved_step, self.saved_at = self.state.step, time.monotonic()
        if wait:
            self.saver.finish()
        self._tell_saved()

    def _tell_saved(self) -> None:
        for line in self.saver.news():
            self.note(line)

    def bad_update(self, wrong: str) -> bool:
        """Apply `trainer.non_finite` to an update that is `wrong` in these words. The weights have not been touched.
        Returns whether the run was rewound."""
        policy, state = self.recipe.trainer.non_finite, self.state
        where = f"step {state.step}: {wrong}"
        state.non_finite += 1
        if policy == "stop" or state.non_finite > self.recipe.trainer.max_non_finite:
            self.optimizer.zero_grad(set_to_none=True)
            self.save()
            gave_up = "" if policy == "stop" else f" for the {state.non_finite}th time (trainer.max_non_finite)"
            raise UserError(
                f"{where}{gave_up}. The update was not made and the state before it is saved. Look at the data of this "
                f"step, go on without it (--resume trainer.non_finite=skip), or start again under another run.name "
                f"with a lower optimizer.lr or trainer.clip."
            )
        if policy == "skip":
            self.note(f"{where}: update skipped ({state.non_finite} so far)")
            return False
        self.saver.finish()
        self._tell_saved()
        saved = healthy.take_newest(self.folder.checkpoints, self.world, self.note)
        if not saved:
            raise UserError(f"{where}, and there is no checkpoint to rewind to; set checkpoint.every")
        before = State.from_dict(checkpoint.read_state(saved))
        if before.stage != state.stage:
            raise UserError(f"{where}, and the last checkpoint is of the stage before; set checkpoint.every")
        afresh = (
            before.stage_step == 0 and self.recipe.optimizer_state == "reset"
        )  # it holds the stage before's moments
        if afresh:
            restart(self.optimizer)
        checkpoint.load(saved, self.root, None if afresh else self.optimizer, verify=False)
        skip = state.stage_step - before.stage_step + 1
        state.skipped += skip
        state.stage_step, state.step, state.tokens = before.stage_step, before.step, before.tokens
        state.norms = before.norms
        self.saved_step = state.step  # what is damaged is saved again
        self.note(f"{where}: rewound to {saved.name}, leaving out {skip} steps of data")
        return True


def seconds(text: str) -> float:
    """`HH:MM:SS` or `DD:HH:MM:SS` -> seconds."""
    parts = [int(p) for p in text.split(":")]
    days, rest = (parts[0], parts[1:]) if len(parts) == 4 else (0, parts)
    hours, minutes, secs = rest
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + secs
