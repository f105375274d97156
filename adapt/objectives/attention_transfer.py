"""Recurrent layers learn the heads of the attention they replace, in one copy of the model (LoLCATs, LAWCAT stage 1).

    loss = scale * mean over layers, tokens and channels of (heads_student - heads_teacher)^2

before the output projection. Each layer's queries, keys and values are computed once and used by both; the teacher's
output goes on to the next layer, so every layer sees what it would see in the teacher, learns by itself, and only what
conversions created gets a gradient. Raw errors of layers cannot be compared; `relative_error/<layer>` can: the mean over
tokens of |student - teacher|^2 / |teacher|^2 (`relative_error`: over the layers, too). `log2_half_life/<layer>` is the mean
over tokens, heads and channels of log2 of the tokens after which half is forgotten, which bounds how far back it recalls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adapt.components import objectives
from adapt.data.batch import PAD, Batch
from adapt.errors import Problem
from adapt.models import attention
from adapt.models.layout import Layout
from adapt.objectives.base import Facts, Models, Prepared, Stateless, Term

WATCHED = ("relative_error", "log2_half_life")
"""What a layer reports besides its loss, in linear_mixer.py's order."""


@dataclass(frozen=True, kw_only=True)
class AttentionTransferConfig:
    scale: float = 1000.0
    """Factor of the mean squared error, so that gradients of small head outputs have a size; with AdamW it matters to
    clipping alone."""

    def problems(self, recipe) -> Iterator[Problem]:
        if not (self.scale > 0 and math.isfinite(self.scale)):
            yield Problem("objective.scale", f"{self.scale} must be above 0; 1000 is usual")
        if not any(c.declares("transfers") for c in recipe.model.conversions):
            what = "attention_transfer teaches converted layers, and model.conversions makes none; add lawcat or mamba2"
            yield Problem("objective", what)
        if recipe.trainable.include == ("*",):
            what = (
                "['*'] promises that everything trains, and attention_transfer gives a gradient to nothing but what "
                "conversions created: trainable.include=['*.recurrence.*']"
            )
            yield Problem("trainable.include", what)


class AttentionTransfer(Stateless):
    inside_layers = "created"
    """No gradient leaves what conversions created (adapt.plan.work)."""
    scored = 0.0
    """Rows of logits for each token (adapt.plan.work)."""

    def __init__(self, facts: Facts, scale: float):
        self.backend, self.layers, self.scale = facts.attention, facts.learning, scale

    def prepare(self, batch: Batch, *, seed: int, step: int) -> Prepared:
        real = batch.role != PAD
        count = int(real.sum())
        inputs = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "layout": Layout.causal(batch.doc_ids, batch.position_ids),
            "weight": real.float(),
        }
        terms = {"transfer": Term(count, self.scale), "relative_error": Term(count * len(self.layers), 0.0)}
        return Prepared(inputs, terms | {f"{name}/{i:02d}": Term(count, 0.0) for name in WATCHED for i in self.layers})

    def __call__(self, models: Models, inputs: dict[str, Any]) -> dict[str, Tensor]:
        out = attention.decode(
            models.student,
            inputs["input_ids"],
            inputs["position_ids"],
            inputs["layout"],
            self.backend,
            transfer=inputs["weight"],
        )
        loss = sum(found[0] for found in out.errors.values()) / len(out.errors)
        seen = {
            f"{name}/{i:02d}": found[place].detach()
            for place, name in enumerate(WATCHED, 1)
            for i, found in out.errors.items()
        }
        whole = sum(found[1].detach() for found in out.errors.values())
        return {"transfer": loss, "relative_error": whole, **seen}


@objectives.register("attention_transfer")
def attention_transfer(config: AttentionTransferConfig, facts: Facts) -> AttentionTransfer:
    return AttentionTransfer(facts, config.scale)
