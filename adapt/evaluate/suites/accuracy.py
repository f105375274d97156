"""Next-token accuracy: how often the likeliest token is the one that comes.

accuracy/<dataset>   share of the scored tokens
"""

from __future__ import annotations

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
    from adapt.evaluate.tokens import scored, token_mean
    from adapt.objectives.base import Models

    def right(models: Models, inputs: dict) -> int:
        rows, head = scored(models.student, inputs, context.facts.attention)
        parts = zip(rows.split(CHUNK), inputs["target"].split(CHUNK), strict=True)
        return sum(int(((part @ head.T).argmax(-1) == target).sum()) for part, target in parts)

    return {f"accuracy/{label}": token_mean(context, label, right) for label in context.datasets}
