"""Plain autoregressive training on packed rows: each supervised token is predicted from the one before it.

Domain adaptation is this on new text, with replay of old text, and may hold on to the base's own distribution there:

    loss = CE over all targets + kl_to_base * mean over replay targets of KL(p_base || p)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapt.components import objectives
from adapt.data.batch import Batch
from adapt.errors import Problem
from adapt.losses.linear_cross_entropy import linear_cross_entropy
from adapt.losses.linear_kl import linear_kl
from adapt.models import attention
from adapt.models.layout import Layout
from adapt.objectives.base import Facts, Models, Prepared, Stateless, Targets, Term, flat_rows


@dataclass(frozen=True, kw_only=True)
class NextTokenConfig:
    kl_to_base: float = 0.0
    """Weight of KL(teacher || student) per token of the training data marked `replay`, with the base as its teacher
    (`teacher: {base: self}`): old text keeps not only its likelihood but the whole distribution."""

    teacher_reads: ClassVar[str] = "replay"
    """Rows that the teacher reads (adapt.plan.work)."""

    @property
    def needs_teacher(self) -> bool:
        return self.kl_to_base > 0

    @property
    def heads(self) -> int:
        """Calls of the head in a microbatch (adapt.plan.work)."""
        return 2 if self.kl_to_base else 1

    def problems(self, recipe) -> Iterator[Problem]:
        if not (self.kl_to_base >= 0 and math.isfinite(self.kl_to_base)):
            yield Problem("objective.kl_to_base", f"{self.kl_to_base} must be 0 or more; 0.1 to 1 is a beginning")
        elif self.kl_to_base and not any(dataset.replay for dataset in recipe.data.train):
            yield Problem(
                "objective.kl_to_base",
                f"{self.kl_to_base} would weigh nothing: it is measured on replay, and no entry of data.train is "
                "marked `replay: true`",
            )


@dataclass(frozen=True)
class Replayed:
    """The replay rows of a microbatch, as the teacher reads them (one row of anything, where there are none)."""

    some: bool
    input_ids: Tensor
    position_ids: Tensor
    layout: Layout
    source: Tensor
    """[M] where the student's output before each replay target stands, flat over the microbatch."""
    teacher_source: Tensor
    """[M] the same, flat over the replay rows."""
    weight: Tensor | None
    """[M] fp32, or None where all are 1."""

    def to(self, device, non_blocking: bool = False) -> Replayed:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Layout):
                moved[name] = value.to(device)
            elif isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=non_blocking)
        return Replayed(**moved)


class NextToken(Stateless):
    def __init__(self, facts: Facts, kl_to_base: float = 0.0):
        self.backend, self.replay, self.kl_to_base = facts.attention, facts.replay, kl_to_base

    def prepare(self, batch: Batch, *, seed: int, step: int) -> Prepared:
        targets = Targets.of(batch)
        inputs = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "layout": Layout.causal(batch.doc_ids, batch.position_ids),
            "source": targets.row * batch.input_ids.shape[1] + targets.col - 1,
            "target": targets.ids,
            "weight": targets.weight,
        }
        terms = {"ar": Term(len(targets.ids))}
        if self.kl_to_base:
            inputs["replay"] = replayed = self._replayed(batch, targets)
            terms["kl"] = Term(len(replayed.source), self.kl_to_base)
        return Prepared(inputs, terms)

    def _replayed(self, batch: Batch, targets: Targets) -> Replayed:
        mine = torch.isin(batch.source, torch.tensor(sorted(self.replay), dtype=batch.source.dtype))
        rows = mine.nonzero()[:, 0]
        place = mine.long().cumsum(0) - 1  # of each replay row among the replay rows
        chosen = mine[targets.row].nonzero()[:, 0]
        row, col, width = targets.row[chosen], targets.col[chosen], batch.input_ids.shape[1]
        shown = rows if len(rows) else torch.zeros(1, dtype=torch.long)
        return Replayed(
            some=bool(len(rows)),
            input_ids=batch.input_ids[shown],
            position_ids=batch.position_ids[shown],
            layout=Layout.causal(batch.doc_ids[shown], batch.position_ids[shown]),
            source=row * width + col - 1,
            teacher_source=place[row] * width + col - 1,
            weight=None if targets.weight is None else targets.weight[chosen],
        )

    def __call__(self, models: Models, inputs: dict[str, Any]) -> dict[str, Tensor]:
        student = models.student
        hidden = attention.hidden_states(
            student, inputs["input_ids"], inputs["position_ids"], inputs["layout"], self.backend
        )
        loss = linear_cross_entropy(
            flat_rows(hidden, inputs["source"]),
            attention.head_weight(student),
            inputs["target"],
            weight=inputs["weight"],
        )
        if "replay" not in inputs:
            return {"ar": loss}
        return {"ar": loss, "kl": self._kl(models, hidden, inputs["replay"])}

    def _kl(self, models: Models, hidden: Tensor, replayed: Replayed) -> Tensor:
        """Sum of the divergences over the replay targets; a microbatch without any asks the teacher only where its
        shards need every rank."""
        rows, head = flat_rows(hidden, replayed.source), attention.head_weight(models.student)
        if not (replayed.some or models.lockstep):
            return linear_kl(rows, head, rows, head)
        with torch.no_grad():
            theirs = attention.hidden_states(
                models.teacher, replayed.input_ids, replayed.position_ids, replayed.layout, self.backend
            )
        return linear_kl(
            rows,
            head,
            flat_rows(theirs, replayed.teacher_source),
            attention.head_weight(models.teacher),
            weight=replayed.weight,
        )


@objectives.register("next_token")
def next_token(config: NextTokenConfig, facts: Facts) -> NextToken:
    return NextToken(facts, config.kl_to_base)
