"""Every problem of a recipe, found before any weight is loaded. Imports no Lightning."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from adapt.config import Recipe, Resolved
from adapt.config.arms import gathered
from adapt.config.schema import Data, Run, Trainable
from adapt.errors import NotReachable, Problem, RecipeError, UserError, nearest
from adapt.registry import Selection
from adapt.train.mixing import total_steps
from adapt.train.rules import core_problems


@dataclass
class Report:
    problems: list[Problem] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    """What stays open (the base is out of reach, offline)."""


def check(resolved: Resolved, offline: bool = False) -> Report:
    """All stages of all arms; each problem once. `offline` reaches for nothing that is not on this machine."""
    return _check_arms(resolved, offline) if resolved.arms else _check_run(resolved, offline)


def _check_arms(resolved: Resolved, offline: bool) -> Report:
    each = {name: _check_run(arm, offline) for name, arm in resolved.arms.items()}
    report = Report(problems=gathered({name: found.problems for name, found in each.items()}, resolved.plain))
    report.problems += _between_arms(resolved)
    for key in ("checked", "unchecked"):
        lines = dict.fromkeys(line for found in each.values() for line in getattr(found, key))
        getattr(report, key).extend(lines)
    report.checked.append(f"{len(each)} arms on the same data, of the same length: {', '.join(each)}")
    return report


def _between_arms(resolved: Resolved) -> Iterator[Problem]:
    """Arms differ, and in nothing that would leave nothing to compare."""
    (first, model), *others = resolved.arms.items()
    apart = "make it a run of its own, and draw them together with adapt report --compare"
    for index, (name, arm) in enumerate(others, 1):
        if _data_of(arm) != _data_of(model):
            yield Problem(f"arms.{name}", f"its stages read other data than those of arms.{first}; {apart}")
        if None not in (lengths := (_tokens_of(arm), _tokens_of(model))) and lengths[0] != lengths[1]:
            what = f"trains on {lengths[0]:,} tokens, and arms.{first} on {lengths[1]:,}; give them the same number"
            yield Problem(f"arms.{name}.trainer", f"{what}, or {apart}")
        for twin in list(resolved.arms)[:index]:
            if _but_for_the_folder(arm) == _but_for_the_folder(resolved.arms[twin]):
                what = f"comes out the same as arms.{twin}: what it overrides is as it was, or `stages` set their own"
                yield Problem(f"arms.{name}", f"{what}; change it, or leave it out (null)")
                break


def _data_of(arm: Resolved) -> list[Data]:
    return [data for data, _ in itertools.groupby(stage.data for stage in arm.stages)]


def _tokens_of(arm: Resolved) -> int | None:
    try:
        return sum(total_steps(stage) * stage.trainer.batch_tokens for stage in arm.stages)
    except (TypeError, ZeroDivisionError):  # neither steps nor tokens: that has its own letter
        return None


def _but_for_the_folder(arm: Resolved) -> list[Recipe]:
    return [dataclasses.replace(stage, run=Run(name="")) for stage in arm.stages]


def _check_run(resolved: Resolved, offline: bool) -> Report:
    report = Report()
    stages = resolved.stages
    _add(report, resolved, [list(core_problems(recipe, index)) for index, recipe in enumerate(stages)])
    report.checked.append(
        f"{len(stages)} stage{'s' * (len(stages) > 1)}: every key is known, has its type and its range"
    )
    report.problems += _between(resolved)
    chosen = [list(selections(recipe)) for recipe in stages]
    for early in chosen[:-1]:  # samples are made once, with what the last stage leaves
        early[:] = [(where, choice) for where, choice in early if not where.startswith("generation.")]
    _add(report, resolved, [_of_components(r, c) for r, c in zip(stages, chosen, strict=True)])
    names = dict.fromkeys(choice.name for stage in chosen for _, choice in stage)
    report.checked.append(f"components fit together: {', '.join(names)}")
    _check_data(resolved, offline, report)
    _check_bases(resolved, offline, report)
    return report


def further(error: RecipeError, offline: bool = False) -> list[Problem]:
    """What else is wrong with a recipe that cannot be read whole, without guesses about the keys that are wrong."""
    if error.readable is None:
        return []
    wrong = {_bare(p.where) for p in error.problems}
    for problem in error.problems:  # the key that was meant is not known either
        if meant := re.search(r"Did you mean '([^']+)'", problem.what):
            wrong.add(f"{_bare(problem.where).rpartition('.')[0]}.{meant[1]}".lstrip("."))

    def depends(problem: Problem) -> bool:
        where = _bare(problem.where)
        near = (where == w or w.startswith(f"{where}.") or where.startswith((f"{w}.", f"{w}[")) for w in wrong)
        return any(near) or any(w in problem.what for w in wrong)

    return [p for p in problems(error.readable, offline) if not depends(p)]


def _bare(where: str) -> str:
    """A key without the arm and the stage it is of."""
    return re.sub(r"^(arms\.[^.]+\.)?(stages\[\d+\](\.| \(.*\) ))?", "", where)


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


BUILT_ONCE = (
    "trainer.precision",
    "trainer.compile",
    "trainer.activation_checkpointing",
    "trainer.deterministic",
    "trainer.mesh",
    "trainer.devices",
    "trainable.lora",
)


def _between(resolved: Resolved) -> Iterator[Problem]:
    """Rules that look at a stage and the one before it."""
    for index, (before, recipe) in enumerate(itertools.pairwise(resolved.stages), 1):
        if recipe.optimizer_state == "keep" and recipe.optimizer.name != before.optimizer.name:
            yield Problem(
                f"stages[{index}].optimizer_state",
                f"{recipe.optimizer.name} cannot go on with what {before.optimizer.name} left; use reset",
            )
        for key in BUILT_ONCE:
            was, now = (functools.reduce(getattr, key.split("."), stage) for stage in (before, recipe))
            if was != now:
                yield Problem(
                    f"stages[{index}].{key}",
                    "the model is built and sharded once for all stages, so this cannot change between them: set it "
                    "outside of `stages` (or make two runs, the second from the export of the first)",
                )


def _of_components(recipe: Recipe, chosen: list[tuple[str, Selection]]) -> list[Problem]:
    found = []
    for where, choice in chosen:
        if hasattr(choice.config, "problems"):
            found += [p if p.where else Problem(where, p.what) for p in choice.config.problems(recipe)]
    return found


def _check_data(resolved: Resolved, offline: bool, report: Report) -> None:
    """Every source is opened; nothing is read."""
    opened: list[tuple[Recipe, list[Problem]]] = []
    for recipe in resolved.stages:
        found = next((f for r, f in opened if r.data == recipe.data), None)
        opened.append((recipe, _open(recipe, offline, report) if found is None else found))
    last = len(opened) - 1
    measured = [_of_metrics(recipe, found, last=i == last) for i, (recipe, found) in enumerate(opened)]
    _add(report, resolved, [found + more for (_, found), more in zip(opened, measured, strict=True)])
    if not any(found for _, found in opened):
        recipe = resolved.recipe
        report.checked.append(f"data: {len(recipe.data.train)} training and {len(recipe.data.eval)} held-out sources")


def _open(recipe: Recipe, offline: bool, report: Report) -> list[Problem]:
    from adapt.data.prepare import open_sources, pairs_problem

    try:
        held_out, training = open_sources(recipe.data)
    except UserError as error:
        return error.problems
    found = []
    for where, dataset, source in [*training, *held_out]:
        fields = getattr(dataset.source.config, "fields", None)
        if fields is not None and (fields.chosen or fields.rejected) and not recipe.objective.declares("pairs"):
            found.append(pairs_problem(recipe, where))
        if not getattr(source, "remote", False):
            continue
        try:
            if offline:
                raise NotReachable("")
            getattr(source, "check", source.fingerprint)()
        except NotReachable as error:
            if not offline and not recipe.model.arch:  # a stated shape is for planning where the Hub is not
                found += [Problem(where, p.what) for p in error.problems]
            elif (line := f"{where}: {source.where} is out of reach") not in report.unchecked:
                report.unchecked.append(line)
        except UserError as error:
            found += [Problem(p.where or where, p.what) for p in error.problems]
    return found


def _of_metrics(recipe: Recipe, of_data: list[Problem], *, last: bool) -> list[Problem]:
    """Metrics that rules name exist, and no suite overwrites another's. The `last` stage is what is exported."""
    evaluation = recipe.evaluation
    if not evaluation.suites or of_data:
        return []
    labels = [d.name or d.source.build().label for d in recipe.data.eval]
    owner: dict[str, int] = {}
    found = []
    for index, suite in enumerate(evaluation.suites):
        own = suite.config.metrics(recipe, labels) if hasattr(suite.config, "metrics") else []
        if twice := [m for m in own if m in owner]:
            what = f"measures {twice[0]!r} as evaluation.suites[{owner[twice[0]]}] does, and one would hide the other"
            found.append(
                Problem(f"evaluation.suites[{index}]", f"{what}; give them different settings, or leave one out")
            )
        owner = {**dict.fromkeys(own, index), **owner}
    if all(hasattr(s.config, "metrics") for s in evaluation.suites):
        named = [("evaluation.best", evaluation.best)] if evaluation.best is not None else []
        named += [(f"evaluation.stop[{i}].metric", rule.metric) for i, rule in enumerate(evaluation.stop)]
        if last and (wanted := recipe.export.interpolation):
            where = "export.interpolation"
            named += [(f"{where}.minimise", wanted.minimise)] if wanted.minimise is not None else []
            named += [(f"{where}.limits[{i}].metric", bound.metric) for i, bound in enumerate(wanted.limits)]
        found += [
            Problem(where, f"no suite measures {metric!r}.{nearest(metric, owner)} Measured: {', '.join(owner)}")
            for where, metric in named
            if metric not in owner
        ]
    return found


def _check_bases(resolved: Resolved, offline: bool, report: Report) -> None:
    from adapt.pretrained.check import inspect_base

    by_length = {recipe.data.seq_len: inspect_base(recipe, offline=offline) for recipe in resolved.stages}
    known = {str(p) for p in report.problems}
    for base in by_length.values():
        report.problems += [p for p in dict.fromkeys(base.problems) if str(p) not in known]
        known |= {str(p) for p in base.problems}
        report.unchecked += [u for u in base.unchecked if u not in report.unchecked]
    base = next(iter(by_length.values()))
    config = base.config
    if config is not None:
        report.checked.append(
            f"base model: {config.model_type}, {config.num_hidden_layers} layers; tokenizer and row length"
        )
        if not base.problems:
            _add(report, resolved, [_of_trainable(recipe.trainable, config) for recipe in resolved.stages])


def _of_trainable(trainable: Trainable, config: Any) -> list[Problem]:
    """Patterns and adapters against the names of a model without weights."""
    if trainable == Trainable():
        return []
    import torch
    from transformers import AutoModelForCausalLM

    from adapt.conversion.mixers import created_parameters
    from adapt.pretrained.lora import adapted_names, lora_problems
    from adapt.train.frozen_rows import row_parameters
    from adapt.train.trainable import select

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if trainable.lora is not None and (found := lora_problems(model, trainable.lora)):
        return found
    names = adapted_names(model, trainable.lora) if trainable.lora is not None else dict(model.named_parameters())
    try:
        chosen = select(list(names), trainable, created_parameters(model))
    except UserError as error:
        return error.problems
    if trainable.rows == "new" and trainable.lora is None and not chosen & row_parameters(model).keys():
        names = " and ".join(row_parameters(model))
        return [Problem("trainable.rows", f"new: include and exclude leave nothing with rows to train; add {names}")]
    return []


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
