"""The student learns the teacher's next-token distribution (Hinton et al. 2015), and, if asked, the text as well.

    loss = kl * mean over targets of KL(p_teacher || p) + ce * mean over targets of CE

The divergence is summed in float32 over chunks of tokens, and no logits of a whole row are formed on either side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

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
class LogitDistillationConfig:
    kl: float = 1.0
    """Weight of the divergence from the teacher."""
    ce: float = 0.0
    """Weight of the cross-entropy of the text itself."""
    reduction: Literal["token", "batchmean"] = "token"
    """`token`: the mean over supervised tokens. `batchmean`: the sum over all positions, padding and prompts too, by
    rows, as PyTorch's reduction of that name gives it and MambaInLlama trains: it grows with the row length."""

    @property
    def heads(self) -> int:
        """Calls of the head in a microbatch (adapt.plan.work)."""
        return 2 if self.ce else 1

    def problems(self, recipe) -> Iterator[Problem]:
        for key in ("kl", "ce"):
            if not (getattr(self, key) >= 0 and math.isfinite(getattr(self, key))):
                yield Problem(f"objective.{key}", f"{getattr(self, key)} must be 0 or more")
        if self.kl == 0:
            yield Problem("objective.kl", "is 0, so nothing would be distilled; use the objective next_token")


class LogitDistillation(Stateless):
    needs_teacher = True

    def __init__(self, config: LogitDistillationConfig, facts: Facts):
        self.config, self.backend = config, facts.attention

    def prepare(self, batch: Batch, *, seed: int, step: int) -> Prepared:
        targets, width = Targets.of(batch), batch.input_ids.shape[1]
        source, weight = targets.row * width + targets.col - 1, targets.weight
        terms = {}
        inputs = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "layout": Layout.causal(batch.doc_ids, batch.position_ids),
            "source": source,
            "weight": weight,
        }
        if self.config.reduction == "batchmean":
            inputs |= {"source": torch.arange(batch.num_rows * width), "weight": None}
            terms["kl"] = Term(batch.num_rows, self.config.kl, targets=batch.num_rows * width)
        else:
            terms["kl"] = Term(len(source), self.config.kl)
        if self.config.ce:
            inputs |= {"ce_source": source, "ce_weight": weight, "target": targets.ids}
            terms["ar"] = Term(len(source), self.config.ce)
        return Prepared(inputs, terms)

    def __call__(self, models: Models, inputs: dict[str, Any]) -> dict[str, Tensor]:
        rows = inputs["input_ids"], inputs["position_ids"], inputs["layout"], self.backend
        with torch.no_grad():
            theirs = attention.hidden_states(models.teacher, *rows)
        ours, head = attention.hidden_states(models.student, *rows), attention.head_weight(models.student)
        found = {
            "kl": linear_kl(
                flat_rows(ours, inputs["source"]),
                head,
                flat_rows(theirs, inputs["source"]),
                attention.head_weight(models.teacher),
                weight=inputs["weight"],
            )
        }
        if "target" in inputs:
            rows = flat_rows(ours, inputs["ce_source"])
            found["ar"] = linear_cross_entropy(rows, head, inputs["target"], weight=inputs["ce_weight"])
        return found


@objectives.register("logit_distillation")
def logit_distillation(config: LogitDistillationConfig, facts: Facts) -> LogitDistillation:
    return LogitDistillation(config, facts)
