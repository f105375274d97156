"""Means over the scored tokens of held-out text, each token by the output before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from adapt.evaluate.context import EvalContext
from adapt.models import attention
from adapt.objectives.base import Models, flat_rows
from adapt.objectives.next_token import NextToken


def scored(model: nn.Module, inputs: dict[str, Any], backend: str) -> tuple[Tensor, Tensor]:
    """(hidden state [N, C] before each of the N scored tokens, head [V, C]) of the inputs that NextToken prepares."""
    hidden = attention.hidden_states(model, inputs["input_ids"], inputs["position_ids"], inputs["layout"], backend)
    return flat_rows(hidden, inputs["source"]), attention.head_weight(model)


def token_mean(context: EvalContext, label: str, total: Callable[[Models, dict[str, Any]], float]) -> float:
    """Sum of `total(models, inputs)` over the rows of a held-out set, by its scored tokens; NaN without any. Collective."""
    objective, sums = NextToken(context.facts), {"total": 0.0, "tokens": 0.0}
    for batch in context.batches(label):
        prepared = objective.prepare(batch, seed=context.seed, step=0).to(context.device)
        sums["total"] += context.call(total, prepared.inputs)
        sums["tokens"] += prepared.terms["ar"].count
    sums = context.reduce(sums)
    return sums["total"] / sums["tokens"] if sums["tokens"] else math.nan
