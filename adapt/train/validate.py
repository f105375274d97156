"""Every problem of a recipe, found before any weight is loaded. Imports no Lightning."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adapt.config import Recipe, Resolved
from adapt.errors import Problem, UserError
from adapt.registry import Selection


@dataclass
class Report:
    problems: list[Problem] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    """What stays open (the base is out of reach, offline)."""


def check(resolved: Resolved, offline: bool = False) -> Report:
    """All stages; each problem once. `offline` reaches for nothing that is not on this machine."""
    report = Report()
    stages = resolved.stages
    _add(report, resolved, [list(_core(recipe, index)) for index, recipe in enumerate(stages)])
    report.checked.append(
        f"{len(stages)} stage{'s' * (len(stages) > 1)}: every key is known, has its type and its range"
    )
    report.problems += _between(resolved)
    chosen = [list(selections(recipe)) for recipe in stages]
    _add(report, resolved, [_of_components(r, c) for r, c in zip(stages, chosen, strict=True)])
    names = dict.fromkeys(choice.name for stage in chosen for _, choice in stage)
    report.checked.append(f"components fit together: {', '.join(names)}")
    if not any(p.where.startswith(("model", "data.seq_len")) for p in report.problems):
        _check_bases(resolved, offline, report)
    return report


def problems(resolved: Resolved, offline: bool = False) -> list[Problem]:
    return check(resolved, offline).problems


def check_or_raise(resolved: Resolved) -> None:
    """What `fit` does before it loads anything."""
    found = problems(resolved)
    if found:
        raise UserError(found)


def selections(recipe: Recipe) -> Iterator[tuple[str, Selection]]:
    """Every component the recipe selects, those inside other components too, with its dotted key."""

    def walk(value: Any, where: str) -> Iterator[tuple[str, Selection]]:
        if isinstance(value, Selection):
            yield where, value
            value = value.config
        if isinstance(value, tuple):
            for index, item in enumerate(value):
                yield from walk(item, f"{where}[{index}]")
        elif dataclasses.is_dataclass(value):
            for f in dataclasses.fields(value):
                yield from walk(getattr(value, f.name), f"{where}.{f.name}" if where else f.name)

    yield from walk(recipe, "")


def _between(resolved: Resolved) -> Iterator[Problem]:
    """Rules that look at a stage and the one before it."""
    for index, (before, recipe) in enumerate(itertools.pairwise(resolved.stages), 1):
        if recipe.optimizer_state == "keep" and recipe.optimizer.name != before.optimizer.name:
            yield Problem(
                f"stages[{index}].optimizer_state",
                f"{recipe.optimizer.name} cannot go on with what {before.optimizer.name} left; use reset",
            )


def _of_components(recipe: Recipe, chosen: list[tuple[str, Selection]]) -> list[Problem]:
    found = []
    for where, choice in chosen:
        if hasattr(choice.config, "problems"):
            found += [p if p.where else Problem(where, p.what) for p in choice.config.problems(recipe)]
    return found


def _check_bases(resolved: Resolved, offline: bool, report: Report) -> None:
    from adapt.pretrained.check import inspect_base

    by_length = {recipe.data.seq_len: recipe for recipe in resolved.stages}
    found = [inspect_base(recipe, offline=offline) for recipe in by_length.values()]
    known = {str(p) for p in report.problems}
    for base in found:
        report.problems += [p for p in dict.fromkeys(base.problems) if str(p) not in known]
        known |= {str(p) for p in base.problems}
        report.unchecked += [u for u in base.unchecked if u not in report.unchecked]
    config = found[0].config
    if config is not None:
        report.checked.append(
            f"base model: {config.model_type}, {config.num_hidden_layers} layers; tokenizer and row length"
        )


def _add(report: Report, resolved: Resolved, found: list[list[Problem]]) -> None:
    """A problem of all stages stands once; one of some stages is named after each."""
    for problem in dict.fromkeys(p for stage in found for p in stage):
        stages = [index for index, stage in enumerate(found) if problem in stage]
        if len(stages) == len(found):
            report.problems.append(problem)
        else:
            report.problems += [
                Problem(f"stages[{i}] ({resolved.names[i]}) {problem.where}", problem.what) for i in stages
            ]


def _core(recipe: Recipe, index: int) -> Iterator[Problem]:
    """Rules of the sections the core reads."""
    yield from _run(recipe, index)
    yield from _data(recipe)
    yield from _trainer(recipe)
    yield from _evaluation(recipe)
    yield from _ranges(recipe)


def _run(recipe: Recipe, index: int) -> Iterator[Problem]:
    name = recipe.run.name
    if not re.fullmatch(r"[^\W_][\w.+=@-]*", name):
        yield Problem("run.name", f"{name!r} is no folder name; use letters, digits and . _ - + = @")
    folder = Path(recipe.run.dir)
    if any(p.exists() and not p.is_dir() for p in (folder, *folder.parents)):
        yield Problem("run.dir", f"{recipe.run.dir} leads through a file; run folders cannot be made there")
    if index == 0 and recipe.optimizer_state == "keep":
        yield Problem("optimizer_state", "the first stage has no optimizer before it to keep; leave it out")
    if recipe.logging.wandb is not None and find_spec("wandb") is None:
        yield Problem("logging.wandb", "needs wandb: pip install 'adapt-lm[loggers]', or set it to null")
    lora = recipe.trainable.lora
    if lora is not None and not 0 <= lora.dropout < 1:
        yield Problem("trainable.lora.dropout", f"{lora.dropout} must be in [0, 1)")
    if lora is not None and not lora.targets:
        yield Problem("trainable.lora.targets", "names no module; leave it out for all linear ones")
    if not recipe.trainable.include:
        yield Problem("trainable.include", "is empty, so nothing would train; ['*'] is every parameter")
    if recipe.generation.prompts and not recipe.generation.samplers:
        yield Problem("generation.samplers", "there are prompts and no sampler to decode them with; add e.g. ar")


def _data(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    if not data.train:
        yield Problem("data.train", "there is nothing to train on; give at least one source")
    for index, dataset in enumerate(data.train):
        if not (dataset.weight > 0 and math.isfinite(dataset.weight)):
            yield Problem(f"data.train[{index}].weight", f"{dataset.weight} must be above 0; or leave the entry out")
    for part in ("train", "eval"):
        for index, dataset in enumerate(getattr(data, part)):
            if dataset.max_tokens is not None and dataset.max_tokens < 1:
                yield Problem(f"data.{part}[{index}].max_tokens", f"{dataset.max_tokens} must be 1 or more")
    labels = [d.name for d in data.eval if d.name is not None]
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        yield Problem("data.eval", f"two held-out sets are called {label!r}; their results could not be told apart")
    if data.near_dedup is not None and not 0 < data.near_dedup < 1:
        yield Problem("data.near_dedup", f"{data.near_dedup} must be between 0 and 1; 0.8 is usual, null turns it off")
    if not 0 <= data.max_bad_lines <= 1:
        yield Problem("data.max_bad_lines", f"{data.max_bad_lines} is a fraction of the lines: from 0 to 1")


def _trainer(recipe: Recipe) -> Iterator[Problem]:
    trainer, data = recipe.trainer, recipe.data
    if (trainer.steps is None) == (trainer.tokens is None):
        have = "neither is given" if trainer.steps is None else f"steps={trainer.steps} and tokens={trainer.tokens:,}"
        yield Problem("trainer", f"give exactly one of steps and tokens (how long to train); here {have}")
    if trainer.max_time is not None and not re.fullmatch(r"(\d+:)?\d+:\d\d:\d\d", trainer.max_time):
        yield Problem("trainer.max_time", f"{trainer.max_time!r} is not HH:MM:SS or DD:HH:MM:SS")
    ranks = _ranks(recipe)
    if data.seq_len < 2:
        yield Problem("data.seq_len", f"{data.seq_len} leaves nothing to predict; 512 to 8192 is usual")
    elif trainer.batch_tokens < data.seq_len * ranks or trainer.batch_tokens % (data.seq_len * ranks):
        step = data.seq_len * ranks
        better = max(1, round(trainer.batch_tokens / step)) * step
        over = f" x {ranks} ranks" if ranks > 1 else ""
        yield Problem(
            "trainer.batch_tokens",
            f"{trainer.batch_tokens:,} is not a multiple of data.seq_len={data.seq_len:,}{over}; try {better}",
        )
    mesh, known = trainer.mesh, "WORLD_SIZE" in os.environ or isinstance(trainer.devices, int)
    shard = 1 if mesh.shard == "auto" else mesh.shard
    wrong = ranks % max(1, shard * mesh.replicate) if mesh.shard == "auto" else ranks != shard * mesh.replicate
    if known and wrong:
        yield Problem("trainer.mesh", f"shard={mesh.shard} x replicate={mesh.replicate} does not make {ranks} rank(s)")
    if trainer.non_finite == "rewind" and not recipe.checkpoint.every:
        yield Problem("checkpoint.every", "trainer.non_finite=rewind needs checkpoints to go back to; set it")


def _ranks(recipe: Recipe) -> int:
    """Processes, where they are known beforehand."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return max(1, recipe.trainer.devices) if isinstance(recipe.trainer.devices, int) else 1


def _evaluation(recipe: Recipe) -> Iterator[Problem]:
    evaluation, data = recipe.evaluation, recipe.data
    if (evaluation.best or evaluation.stop) and not evaluation.suites:
        yield Problem("evaluation.suites", "best and stop rules need something measured; add a suite, e.g. bpb")
    if evaluation.suites and not data.eval:
        yield Problem("data.eval", "suites measure on held-out data, and there is none; add a source")
    labels = [d.name for d in data.eval]
    named = [("evaluation.best", evaluation.best)] if evaluation.best is not None else []
    named += [(f"evaluation.stop[{i}].metric", rule.metric) for i, rule in enumerate(evaluation.stop)]
    for where, metric in named:
        dataset = metric.partition("/")[2]
        if labels and None not in labels and not any(dataset == x or dataset.startswith(f"{x}/") for x in labels):
            yield Problem(
                where,
                f"{metric!r} is of no held-out set here ({', '.join(map(str, labels))}); metrics are written "
                f"<what>/<data set>, e.g. bpb/{labels[0]}",
            )
    for index, rule in enumerate(evaluation.stop):
        if rule.above is None and rule.below is None and rule.patience is None:
            yield Problem(f"evaluation.stop[{index}]", "says nothing; give above, below or patience")


AT_LEAST = {
    "trainer.steps": (0, "0 converts and exports"),
    "trainer.tokens": (0, "0 converts and exports"),
    "trainer.batch_tokens": (1, ""),
    "trainer.microbatch": (1, "rows, or auto"),
    "trainer.devices": (1, "processes, or auto"),
    "trainer.max_non_finite": (1, ""),
    "trainer.mesh.shard": (1, "or auto"),
    "trainer.mesh.replicate": (1, ""),
    "trainable.lora.rank": (1, ""),
    "evaluation.every": (1, "steps, or null: only at the start and the end"),
    "evaluation.limit": (1, "rows, or null: all"),
    "checkpoint.every": (1, "steps, or null: only at the end"),
    "checkpoint.keep": (1, ""),
    "logging.every": (1, ""),
    "generation.max_new_tokens": (1, ""),
}
ABOVE_ZERO = {"trainer.clip": "null turns clipping off", "trainable.lora.alpha": "twice the rank is usual"}


def _ranges(recipe: Recipe) -> Iterator[Problem]:
    for key, (least, hint) in AT_LEAST.items():
        value = _get(recipe, key)
        if isinstance(value, int) and value < least:
            yield Problem(key, f"{value} must be {least} or more" + (f" ({hint})" if hint else ""))
    for key, hint in ABOVE_ZERO.items():
        value = _get(recipe, key)
        if value is not None and not (value > 0 and math.isfinite(value)):
            yield Problem(key, f"{value} must be above 0 ({hint})")
    for index, rule in enumerate(recipe.evaluation.stop):
        if rule.patience is not None and rule.patience < 1:
            yield Problem(f"evaluation.stop[{index}].patience", f"{rule.patience} must be 1 or more evaluations")


def _get(value: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        value = getattr(value, key, None)
    return value
