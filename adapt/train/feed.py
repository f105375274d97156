"""A stage's rows, planned to its end: which source is read when, how often, and whether there is enough of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from adapt.config.schema import Recipe
from adapt.data.plan import Plan, tempered
from adapt.data.rows import Rows
from adapt.data.shards import TokenShards
from adapt.data.stream import TrainStream
from adapt.errors import Problem, UserError
from adapt.train.mixing import total_steps, weight_phases
from adapt.train.state import State

WEIGHTS = "weights"
"""Key of the plan among the fingerprints of a stage's data."""
MANY = 4
"""Epochs of the same text up to which repeating it is about as good as new text (Muennighoff et al. 2023, "Scaling
Data-Constrained Language Models", arXiv 2305.16264)."""


@dataclass(frozen=True)
class Feed:
    stream: TrainStream
    steps: int
    """Steps of the stage; fewer than the recipe's where its data ends before."""
    ends_early: bool
    reads: dict[str, str]
    """Label -> what is read of it, for the header."""
    notes: list[str]
    """What else the user should know before it begins."""

    def add_to(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """The manifest of the data, with what became of it in rows."""
        train = zip(manifest["train"], self.stream.rows, strict=True)
        return {**manifest, "train": [{**entry, **rows.facts} for entry, rows in train]}


def feed_of(recipe: Recipe, shards: list[TokenShards], state: State, rows_per_step: int) -> Feed:
    """The stage's data is what its checkpoints were made with, or UserError; its fingerprints go into the state. A stage
    on the data of the stage before goes on in every source where that left off, whatever the weights; any other begins
    at its data's beginning."""
    data = recipe.data
    if wrong := [
        Problem(f"data.train[{i}].document_weight_as", f"{s.label} has no weights of documents; leave this out")
        for i, (s, dataset) in enumerate(zip(shards, data.train, strict=True))
        if dataset.document_weight_as == "loss" and s.document_weights() is None
    ]:
        raise UserError(wrong)
    rows = [
        Rows(
            s,
            data.seq_len,
            recipe.run.seed,
            packing=data.packing,
            cross_document_attention=data.cross_document_attention,
            document_weight_as=dataset.document_weight_as,
        )
        for s, dataset in zip(shards, data.train, strict=True)
    ]
    sources = {f"data.train[{i}] ({r.shards.label})": r.fingerprint for i, r in enumerate(rows)}
    before = {name: value for name, value in state.data.items() if name != WEIGHTS}
    if state.stage_step == 0 and sources != before:
        state.read = []
    elif sources != before:
        raise _changed([name for name in sources | before if sources.get(name) != before.get(name)])
    feed = _planned(recipe, rows, state, rows_per_step)
    plan = hashlib.sha256(json.dumps(feed.stream.plan.facts()).encode()).hexdigest()
    if state.stage_step and state.data[WEIGHTS] != plan:
        raise _changed(["the weights, or the steps that their phases are shares of"])
    state.data = {**sources, WEIGHTS: plan}
    return feed


def _changed(names: list[str]) -> UserError:
    return UserError(
        f"the training data changed since this run's checkpoint: {', '.join(names)}. The run cannot go on exactly. "
        "Restore the data, or start a new run (another run.name) from the export of this one."
    )


def _planned(recipe: Recipe, rows: list[Rows], state: State, rows_per_step: int) -> Feed:
    data, total, per_step = recipe.data, total_steps(recipe), max(1, rows_per_step // rows[0].unit)
    phases = [
        (start * per_step, tempered(weights, [r.shards.num_tokens for r in rows], data.temperature))
        for start, weights in weight_phases(data.train, total)
    ]
    limits = [
        None if dataset.max_epochs is None or not total else int(Fraction(str(dataset.max_epochs)) * r.num_units)
        for dataset, r in zip(data.train, rows, strict=True)
    ]
    plan = Plan(
        phases,
        objective=[dataset.objective_weight for dataset in data.train],
        limits=limits,
        read=state.read or None,
        renormalise=data.exhausted == "renormalise",
    )
    wanted = total + state.skipped
    steps = total if plan.end is None else max(state.stage_step, min(total, plan.end // per_step - state.skipped))
    notes = []
    if steps < total:
        if data.exhausted == "fail" or steps <= state.stage_step == 0:
            raise UserError(_short(recipe, rows, phases, limits, plan, wanted * per_step, steps))
        notes.append(f"the stage ends after {steps:,} of {total:,} steps, where its data does (data.exhausted)")
    labels = _labels(rows)
    if data.exhausted == "renormalise":
        notes += [
            f"{labels[source]} runs dry in step {unit // per_step + 1:,}: read {data.train[source].max_epochs:g} "
            "time(s), as its max_epochs allows; the others share its place"
            for unit, source in plan.dry
            if unit < steps * per_step
        ]
    reads, often = _reads(rows, labels, plan, (steps + state.skipped) * per_step)
    return Feed(TrainStream(rows, plan), steps, steps < total, reads, notes + often)


def _labels(rows: list[Rows]) -> list[str]:
    """Those of the sources, numbered where two are the same."""
    labels = [r.shards.label for r in rows]
    return [f"{x} [{i}]" if labels.count(x) > 1 else x for i, x in enumerate(labels)]


def _reads(rows: list[Rows], labels: list[str], plan: Plan, units: int) -> tuple[dict[str, str], list[str]]:
    reads, notes = {}, [note for label, own in zip(labels, rows, strict=True) for note in _fitted(label, own)]
    for i, (label, own) in enumerate(zip(labels, rows, strict=True)):
        count = plan.counts(units)[i]
        new, epochs = (count - plan.read[i]) * own.unit, count / own.num_units
        share = f"{new * 100 / (units * own.unit):.3g} % of the tokens, " if units else ""
        earlier = f" ({plan.read[i] / own.num_units:.3g} of them before this stage)" if plan.read[i] else ""
        reads[label] = f"{share}{new:,} rows, {epochs:.3g} epoch(s){earlier}"
        if epochs > MANY:
            notes.append(
                f"{label} is read {epochs:.3g} times in all: beyond about {MANY} epochs, repeated text is worth less "
                f"and less; more text, fewer steps or a lower weight may serve better "
                f"(data.train[{i}].max_epochs sets a limit)"
            )
    return reads, notes


def _fitted(label: str, rows: Rows) -> list[str]:
    """Of preference pairs longer than a row."""
    notes, row = [], f"data.seq_len={rows.seq_len:,}"
    if rows.pairs and rows.pairs.num_cut:
        notes.append(f"{label}: {rows.pairs.num_cut:,} pairs are longer than {row}; their prompts lose the beginning")
    if rows.pairs and rows.pairs.num_too_long:
        notes.append(
            f"{label}: {rows.pairs.num_too_long:,} pairs are left out, because {row} has no room for a prompt beside "
            "their answers"
        )
    return notes


def _short(recipe, rows, phases, limits, plan: Plan, units: int, steps: int) -> list[Problem]:
    """Every source that would be read too often, were it not for its limit."""
    wanted = Plan(phases, read=list(plan.read)).counts(units)
    trainer = recipe.trainer
    if trainer.steps is not None:
        fewer = f"trainer.steps={steps}"
    else:
        fewer = f"trainer.tokens={steps * trainer.batch_tokens}"
    less = f"train for less (there is enough for {fewer}), " if steps else ""
    return [
        Problem(
            f"data.train[{i}].max_epochs",
            f"{rows[i].shards.label} would be read {wanted[i] / rows[i].num_units:.3g} times, and "
            f"{recipe.data.train[i].max_epochs:g} are allowed; raise it, lower the source's weight, {less}"
            "or set data.exhausted to `stop` or `renormalise`",
        )
        for i, limit in enumerate(limits)
        if limit is not None and wanted[i] > limit
    ]
