"""Plain autoregressive training on packed rows: each supervised token is predicted from the one before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adapt.components import objectives
from adapt.data.batch import Batch
from adapt.losses.linear_cross_entropy import linear_cross_entropy
from adapt.models import attention
from adapt.models.layout import Layout
from adapt.objectives.base import Facts, Models, Prepared, Targets, Term, flat_rows


@dataclass(frozen=True, kw_only=True)
class NextTokenConfig:
    pass


class NextToken:
    needs_teacher = False

    def __init__(self, facts: Facts):
        self.backend = facts.attention

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
        return Prepared(inputs, {"ar": Term(len(targets.ids))})

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
        return {"ar": loss}

    def largest_step(self) -> int:
        return 0

    def observe(self, results: dict[str, float]) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """There is nothing to go on from."""

    def export_fields(self) -> dict[str, Any]:
        return {}


@objectives.register("next_token")
def next_token(config: NextTokenConfig, facts: Facts) -> NextToken:
    return NextToken(facts)
