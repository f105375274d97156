"""Next-token accuracy: how often the likeliest token is the one that comes.

accuracy/<dataset>   share of the scored tokens
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from adapt.components import suites
from adapt.evaluate.context import EvalContext, Suite

CHUNK = 256
"""Rows whose logits exist at one time."""


@dataclass(frozen=True, kw_only=True)
class AccuracyConfig:
    def metrics(self, recipe, datasets: list[str]) -> list[str]:
        return [f"accuracy/{label}" for label in datasets]


@suites.register("accuracy")
def accuracy(config: AccuracyConfig) -> Suite:
    return measure


def measure(context: EvalContext) -> dict[str, float]:
    from adapt.models import attention
    from adapt.objectives.base import Models, flat_rows
    from adapt.objectives.next_token import NextToken

    objective = NextToken(context.facts)

    def right(models: Models, inputs: dict) -> int:
        hidden = attention.hidden_states(
            models.student, inputs["input_ids"], inputs["position_ids"], inputs["layout"], context.facts.attention
        )
        rows, head = flat_rows(hidden, inputs["source"]), attention.head_weight(models.student)
        parts = zip(rows.split(CHUNK), inputs["target"].split(CHUNK), strict=True)
        return sum(int(((part @ head.T).argmax(-1) == target).sum()) for part, target in parts)

    results = {}
    for label in context.datasets:
        sums = {"right": 0.0, "tokens": 0.0}
        for batch in context.batches(label):
            prepared = objective.prepare(batch, seed=context.seed, step=0).to(context.device)
            sums["right"] += context.call(right, prepared.inputs)
            sums["tokens"] += prepared.terms["ar"].count
        sums = context.reduce(sums)
        results[f"accuracy/{label}"] = sums["right"] / sums["tokens"] if sums["tokens"] else math.nan
    return results
