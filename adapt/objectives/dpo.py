"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) on pairs of answers to a prompt.

    h    = log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected)
    loss = mean over pairs of  -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)

with log-probabilities summed over the answer's tokens (its end included), and s the label smoothing. The reference is the
student as it stands when the stage begins: its log-probabilities of every pair the stage will read are taken once, before
the first step, and kept, so that there is no second model. At the first step h is 0 and the loss ln 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapt.components import objectives
from adapt.data.batch import PAD, Batch
from adapt.errors import Problem
from adapt.losses.linear_log_probability import linear_log_probability
from adapt.models import attention
from adapt.models.layout import Layout
from adapt.objectives.base import Facts, Models, Prepared, Stateless, Targets, Term, flat_rows

WATCHED = ("accuracy", "margin", "reward_chosen", "reward_rejected")
"""Logged with the loss, each a mean over pairs: how often h is above 0, beta h, and beta log p / p_ref of each answer."""
WHOLE_ROWS = -1
"""No step: the dry run's, whose rows are as long as any may be."""


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    beta: float = 0.1
    """How much a log-probability that moves away from the reference's counts: the smaller, the further the student may
    move for the same loss. 0.1 is usual; X-EcoMLA trains with 0.01."""
    label_smoothing: float = 0.0
    """Share of the pairs taken to be labelled the wrong way round (conservative DPO); below 0.5."""
    nll: float = 0.0
    """Weight of the chosen answers' cross-entropy per token besides. DPO lowers their likelihood as long as the rejected
    ones lose more; this holds it up (Pang et al. 2024, arXiv 2404.19733)."""
    reference: Literal["start", "teacher"] = "start"
    """What the student is compared with: itself at the start of the stage, by log-probabilities kept in the run folder; or
    the model of the section `teacher`, run at every step."""

    @property
    def needs_teacher(self) -> bool:
        return self.reference == "teacher"

    @property
    def compares_with_start(self) -> bool:
        return self.reference == "start"

    def problems(self, recipe) -> Iterator[Problem]:
        if not (self.beta > 0 and math.isfinite(self.beta)):
            yield Problem("objective.beta", f"{self.beta} must be above 0; 0.1 is usual, X-EcoMLA takes 0.01")
        if not 0 <= self.label_smoothing < 0.5:
            what = (
                f"{self.label_smoothing} is a share of wrong labels: 0 or more, and below 0.5, where they say nothing"
            )
            yield Problem("objective.label_smoothing", what)
        if not (self.nll >= 0 and math.isfinite(self.nll)):
            yield Problem("objective.nll", f"{self.nll} must be 0 or more; 0.2 to 1 is usual")


class Dpo(Stateless):
    pairs = True
    logits_twice = True
    """The way back forms the logits once more (adapt.plan.work)."""

    def __init__(self, config: DpoConfig, facts: Facts):
        self.config, self.backend = config, facts.attention
        self._start: Callable[[Batch], Tensor] | None = None

    def remember(self, start: Callable[[Batch], Tensor]) -> None:
        self._start = start

    def prepare(self, batch: Batch, *, seed: int, step: int) -> Prepared:
        if batch.num_rows % 2 or not torch.equal(batch.pair_index[::2], batch.pair_index[1::2]):
            raise ValueError(f"pair_index {batch.pair_index.tolist()}: the rows of a pair must stand together")
        if step != WHOLE_ROWS:
            batch = _shortened(batch)
        targets, width = Targets.of(batch), batch.input_ids.shape[1]
        inputs = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "layout": Layout.causal(batch.doc_ids, batch.position_ids),
            "source": targets.row * width + targets.col - 1,
            "target": targets.ids,
            "place": targets.row * width + targets.col,
        }
        if self.config.compares_with_start:
            if self._start is None:
                raise RuntimeError("the objective was not told what the student was at the start (remember)")
            inputs["reference"] = self._start(batch)
        pairs = batch.num_rows // 2
        terms = {"dpo": Term(pairs)}
        if self.config.nll:
            terms["nll"] = Term(int((targets.row % 2 == 0).sum()), self.config.nll)
        return Prepared(inputs, terms | {name: Term(pairs, 0.0) for name in WATCHED})

    def row_values(self, models: Models, inputs: dict[str, Any]) -> Tensor:
        """[B] log-probability of each row's answer, fp32 or wider."""
        return self._log_probabilities(models.student, inputs)

    def _log_probabilities(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        ids = inputs["input_ids"]
        hidden = attention.hidden_states(model, ids, inputs["position_ids"], inputs["layout"], self.backend)
        rows = flat_rows(hidden, inputs["source"])
        found = linear_log_probability(rows, attention.head_weight(model), inputs["target"])
        # each at its own place of the rows: a sum whose order never varies, unlike scattered additions on a GPU
        return found.new_zeros(ids.numel()).index_copy(0, inputs["place"], found).view(ids.shape).sum(1)

    def __call__(self, models: Models, inputs: dict[str, Any]) -> dict[str, Tensor]:
        if "reference" in inputs:
            reference = inputs["reference"]
        else:
            with torch.no_grad():
                reference = self._log_probabilities(models.teacher, inputs)
        ours = self._log_probabilities(models.student, inputs)
        config, moved = self.config, ours - reference.to(ours.dtype)
        chosen, rejected = moved[::2], moved[1::2]
        h = config.beta * (chosen - rejected)
        loss = -(1 - config.label_smoothing) * F.logsigmoid(h) - config.label_smoothing * F.logsigmoid(-h)
        found = {"dpo": loss.sum()}
        if config.nll:
            found["nll"] = -ours[::2].sum()
        h, chosen, rejected = h.detach(), config.beta * chosen.detach(), config.beta * rejected.detach()
        watched = ((h > 0).to(h.dtype).sum(), h.sum(), chosen.sum(), rejected.sum())
        return found | dict(zip(WATCHED, watched, strict=True))

    def largest_step(self) -> int:
        return WHOLE_ROWS


def _shortened(batch: Batch) -> Batch:
    """Without the columns at the end that hold nothing in any row, but for what makes whole tiles of attention."""
    used = int((batch.role != PAD).any(0).nonzero()[-1]) + 1
    width = min(batch.input_ids.shape[1], -(-used // attention.TILE) * attention.TILE)
    shorter = {f.name: value[:, :width] for f in fields(Batch) if (value := getattr(batch, f.name)).ndim == 2}
    return replace(batch, **shorter)


@objectives.register("dpo")
def dpo(config: DpoConfig, facts: Facts) -> Dpo:
    return Dpo(config, facts)
