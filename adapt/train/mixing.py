"""What a recipe says about mixing its training sources: weights over the steps, and what makes no sense of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from adapt.config.schema import Dataset, Recipe
from adapt.data.plan import boundary
from adapt.errors import Problem


def total_steps(recipe: Recipe) -> int:
    if recipe.trainer.steps is not None:
        return recipe.trainer.steps
    return -(-recipe.trainer.tokens // recipe.trainer.batch_tokens)


def weight_phases(datasets: tuple[Dataset, ...], steps: int) -> list[tuple[int, list[float]]]:
    """(first step, weight of every dataset) of each phase; a phase begins wherever a dataset's weight may change."""
    own = [_changes(dataset, steps) for dataset in datasets]
    starts = sorted({start for changes in own for start, _ in changes})
    return [(start, [[w for at, w in changes if at <= start][-1] for changes in own]) for start in starts]


def _changes(dataset: Dataset, steps: int) -> list[tuple[int, float]]:
    """(step, weight from there on), the first at step 0."""
    if not isinstance(dataset.weight, tuple):
        return [(0, dataset.weight)]
    changes, start = [], 0
    for phase in dataset.weight:
        changes.append((start, phase.weight))
        start = steps if phase.until is None else boundary(phase.until, steps)
    return changes


def mixing_problems(recipe: Recipe) -> Iterator[Problem]:
    data, known = recipe.data, len(recipe.data.train) > 0
    for index, dataset in enumerate(data.train):
        where = f"data.train[{index}]"
        found = list(_weight_problems(f"{where}.weight", dataset, recipe))
        known = known and not found
        yield from found
        if dataset.objective_weight is not None and not _positive(dataset.objective_weight):
            yield Problem(
                f"{where}.objective_weight", f"{dataset.objective_weight} must be above 0; null is the source's weight"
            )
        if dataset.max_epochs is not None and not _positive(dataset.max_epochs):
            yield Problem(f"{where}.max_epochs", f"{dataset.max_epochs} must be above 0; null sets no limit")
    for index, dataset in enumerate(data.eval):
        for key in ("objective_weight", "max_epochs"):
            if getattr(dataset, key) is not None:
                yield Problem(f"data.eval[{index}].{key}", "held-out data is only measured on; leave this out")
    if known and (steps := _known_steps(recipe)) is not None:
        for start, weights in weight_phases(data.train, steps):
            if not any(weights):
                yield Problem("data.train", f"from step {start:,} on every weight is 0, so nothing would be read")
                break
    if data.exhausted != "fail" and data.train and all(dataset.max_epochs is None for dataset in data.train):
        yield Problem(
            "data.exhausted",
            f"{data.exhausted} is for sources with a limit, and none has max_epochs (1: read once); give one, or leave "
            "this out",
        )
    if data.temperature is not None and not (data.temperature >= 0 and math.isfinite(data.temperature)):
        yield Problem("data.temperature", f"{data.temperature} must be 0 or more; 1 mixes in proportion to size")
    if recipe.objective.declares("pairs"):
        asked = {
            "data.packing": data.packing != "windows",
            "data.cross_document_attention": data.cross_document_attention,
        }
        asked |= {f"data.train[{i}].objective_weight": d.objective_weight is not None for i, d in enumerate(data.train)}
        for where in (where for where, is_asked in asked.items() if is_asked):
            yield Problem(
                where, "preference pairs are compared as whole sequences, each in a row of its own; leave this out"
            )
        microbatch, pair = recipe.trainer.microbatch, 2 * data.seq_len
        if microbatch != "auto" and microbatch % 2:
            what = f"{microbatch} row(s) would part preference pairs, which have two; give an even number, or auto"
            yield Problem("trainer.microbatch", what)
        if recipe.trainer.batch_tokens % pair and not recipe.trainer.batch_tokens % max(1, data.seq_len):
            what = f"{recipe.trainer.batch_tokens:,} is no multiple of a preference pair's two rows of {data.seq_len:,} tokens"
            better = max(1, round(recipe.trainer.batch_tokens / pair)) * pair
            yield Problem("trainer.batch_tokens", f"{what}; try {better:,}")


def _weight_problems(where: str, dataset: Dataset, recipe: Recipe) -> Iterator[Problem]:
    if not isinstance(dataset.weight, tuple):
        if not (dataset.weight >= 0 and math.isfinite(dataset.weight)):
            yield Problem(where, f"{dataset.weight} must be 0 (not read) or more")
        return
    if not dataset.weight:
        yield Problem(where, "is an empty list; give phases, `[{until: 0.8, weight: 3}, {weight: 1}]`, or a number")
        return
    *before, last = dataset.weight
    steps, previous = _known_steps(recipe), 0
    if last.until is not None:
        yield Problem(f"{where}[{len(before)}].until", "the last phase lasts as long as the stage; leave this out")
    for index, phase in enumerate(dataset.weight):
        here = f"{where}[{index}]"
        if not (phase.weight >= 0 and math.isfinite(phase.weight)):
            yield Problem(f"{here}.weight", f"{phase.weight} must be 0 (not read) or more")
        if index == len(before):
            continue
        if phase.until is None:
            yield Problem(f"{here}.until", "is missing: say where this phase ends; only the last lasts to the end")
        elif not _positive(phase.until):
            yield Problem(f"{here}.until", f"{phase.until} must be above 0: a share of the steps below 1, or a step")
        elif steps:
            end = boundary(phase.until, steps)
            if end < previous:
                yield Problem(
                    f"{here}.until", f"{phase.until:g} is step {end:,}, before the phase begins (step {previous:,})"
                )
            elif phase.until >= 1 and end >= steps:
                yield Problem(
                    f"{here}.until",
                    f"the stage has only {steps:,} step(s), so what follows step {end:,} would never come; give fewer "
                    "steps, or a share below 1 (0.8)",
                )
            previous = end


def _known_steps(recipe: Recipe) -> int | None:
    trainer = recipe.trainer
    if (trainer.steps is None) == (trainer.tokens is None) or trainer.batch_tokens < 1:
        return None  # the trainer's own rules say it
    return total_steps(recipe)


def _positive(value: float) -> bool:
    return value > 0 and math.isfinite(value)
