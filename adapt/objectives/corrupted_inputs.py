"""Next-token training on corrupted inputs: labels, positions and attention are those of clean text.

Legend: B rows, T tokens of a row, M the corrupted positions.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from adapt.data.batch import PAD, Batch
from adapt.errors import Problem, UserError
from adapt.losses.linear_cross_entropy import linear_cross_entropy
from adapt.models import attention
from adapt.models.layout import CLEAN, Layout
from adapt.objectives.base import Facts, Models, Prepared, Targets, Term, flat_rows
from adapt.objectives.corruption import Corruption, Substitute, corrupt, eligible_inputs, row_generators
from adapt.objectives.next_token import NextToken


class CorruptedInputs(NextToken):
    """The loss is the mean over all targets, in two terms that are logged apart, since one cannot be compared with a
    next-token loss: `clean_prefix`, targets predicted from an intact input (the token right before them), and
    `corrupted_input`, those predicted from a corrupted one.

    Wherever the mask token may stand in a row its logit is not in the softmax: no text contains it, so its output row
    would only ever be pushed down (with tied embeddings, the input row with it). At ratio 0 it may stand nowhere, and
    the objective is next-token training to the bit.
    """

    count: Literal["exact", "bernoulli"]

    def __init__(self, config: Corruption, facts: Facts):
        super().__init__(facts)
        if config.replace_rate < 1 and facts.mask_token_id is None:
            raise ValueError("masked inputs need a model with a mask token (conversion `mask_token`)")
        if facts.vocabulary is None and (config.replace_rate > 0 or "special" in config.exclude):
            raise ValueError("special and random tokens are the vocabulary's to name, and the facts have none")
        self.config, self.facts = config, facts
        masks = config.replace_rate < 1
        self.mask_token_id = facts.mask_token_id if masks else None
        ordinary = facts.vocabulary.ordinary if config.replace_rate > 0 else None
        self.noise = Substitute(self.mask_token_id, config.replace_rate, ordinary)

    def ratio_at(self, seed: int, step: int) -> float:
        return self.config.ratio_at(step, self.facts.total_steps)

    def prepare(self, batch: Batch, *, seed: int, step: int) -> Prepared:
        self.refuse_masks(batch)
        ratio = self.ratio_at(seed, step)
        ids, where = self.corrupted(batch, ratio, seed=seed, step=step)
        learned = {"all_targets": None, "corrupted": where, "clean_targets": ~where}[self.config.loss_on]
        targets = Targets.of(batch, learned)
        before = where[targets.row, targets.col - 1]  # the input that predicts: a first token is no target
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": batch.position_ids,
            "layout": self.layout(batch, ids, where),
        }
        terms = {}
        for term, part in (("clean_prefix", ~before), ("corrupted_input", before)):
            chosen = some(targets, part)
            source = chosen.row * ids.shape[1] + chosen.col - 1
            inputs |= scored(term, source, chosen, self.mask_token_id if ratio > 0 else None)
            terms[term] = Term(len(targets.ids), targets=len(chosen.ids))
        return Prepared(inputs, terms, {"mask_ratio": ratio})

    def corrupted(self, batch: Batch, ratio: float, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Corrupted ids and M, [B, T]."""
        return corrupt(
            batch.input_ids,
            self.eligible(batch),
            ratio,
            count=self.count,
            noise=self.noise,
            generators=row_generators(batch, seed),
        )

    def eligible(self, batch: Batch) -> Tensor:
        vocabulary = self.facts.vocabulary
        return eligible_inputs(batch, self.config, None if vocabulary is None else vocabulary.special)

    def layout(self, batch: Batch, ids: Tensor, where: Tensor) -> Layout:
        return Layout.causal(batch.doc_ids, batch.position_ids)

    def refuse_masks(self, batch: Batch) -> None:
        """A mask token in the text would look like a corrupted input, and as a target have an infinite loss."""
        if self.mask_token_id is None:
            return
        found = (batch.input_ids == self.mask_token_id) & (batch.role != PAD)
        if bool(found.any()):
            rows = found.any(1)
            source, row = int(batch.source[rows][0]), int(batch.sample_index[rows][0])
            raise UserError(
                Problem(
                    f"data.train[{source}]",
                    f"row {row} contains the mask token (id {self.mask_token_id}) {int(found[rows][0].sum())} time(s), "
                    "so text and corrupted inputs would look alike; give model.conversions a mask token that the data "
                    "does not have ({name: mask_token, token: '<|mask|>'}), or clean the data",
                )
            )

    def __call__(self, models: Models, inputs: dict[str, Any]) -> dict[str, Tensor]:
        student = models.student
        hidden = attention.hidden_states(
            student, inputs["input_ids"], inputs["position_ids"], inputs["layout"], self.backend
        )
        head = attention.head_weight(student)
        sums = {}
        for key in inputs:
            if not key.endswith("/source"):
                continue
            term = key.removesuffix("/source")
            sums[term] = linear_cross_entropy(
                flat_rows(hidden, inputs[key]),
                head,
                inputs[f"{term}/target"],
                weight=inputs[f"{term}/weight"],
                exclude=inputs[f"{term}/exclude"],
            )
        return sums


def some(targets: Targets, part: Tensor) -> Targets:
    """part [N] bool."""
    weight = None if targets.weight is None else targets.weight[part]
    return Targets(targets.row[part], targets.col[part], targets.ids[part], weight)


def scored(term: str, source: Tensor, targets: Targets, exclude: int | None) -> dict[str, Any]:
    """One term's share of the inputs: flat indices of the outputs that predict, what they predict, and the id that is
    not in their softmax."""
    return {
        f"{term}/source": source,
        f"{term}/target": targets.ids,
        f"{term}/weight": targets.weight,
        f"{term}/exclude": exclude,
    }


def without_masks(batch: Batch, ids: Tensor, mask_token_id: int) -> Layout:
    """Causal rows in which nobody sees a mask token but the mask token itself, which sees the text before it: a stream
    of its own whose blocks are single tokens."""
    masked = (ids == mask_token_id) & (batch.role != PAD)
    stream = torch.where(masked, CLEAN + 1, CLEAN).to(torch.int8)
    return Layout(doc=batch.doc_ids, pos=batch.position_ids, block=batch.position_ids, stream=stream)
