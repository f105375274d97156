"""Mask-enhanced autoregressive prediction (MEAP; Zhuang et al., ICML 2025, arXiv 2502.07490).

Pretraining: a fixed share of a row's inputs becomes the mask token, and every target is learned as in next-token
training. Fine-tuning (`sft_layout`): each sample twice, plainly and as a copy with masked answer tokens, of which those
alone are learned. One loss, no infilling: a masked token is predicted from the position before it.

Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapt.components import objectives
from adapt.data.batch import PAD, Batch
from adapt.errors import Problem, UserError
from adapt.models.layout import Layout
from adapt.objectives.base import Facts, Prepared, Targets, Term
from adapt.objectives.corrupted_inputs import CorruptedInputs, scored
from adapt.objectives.corruption import Corruption, corrupt, row_generators, upstream_cycle51


@dataclass(frozen=True, kw_only=True)
class MeapConfig(Corruption):
    ratio: float = 0.15
    """Fraction of the eligible inputs that are corrupted, an exact number in each row: 0.15 in pretraining, 0.1 in
    fine-tuning (of each answer). A base that never saw a mask token should start with 0.05 to 0.1."""
    rng: Literal["per_row", "upstream_cycle51"] = "per_row"
    """`per_row`: every row of every epoch has its own draw. `upstream_cycle51`: the 51 patterns that the authors'
    scripts cycle through, one for all rows of a step; for reproductions."""
    sft_layout: Literal["separate", "concat"] | None = None
    """Fine-tuning: the masked copy as a sample of its own (the authors' code), or (the paper) behind the clean one in
    one row of twice the length. Prompts are never masked. null: the pretraining form, without copies."""
    isolate_copies: bool = False
    """With `concat`: the copy sees nothing of the clean sample, as with `separate`. Without, it sees the clean answer
    and can copy the masked tokens from it, which weakens the objective."""
    min_answer_tokens: int = 51
    """Tokens an answer needs to be masked, counting those that may be; shorter ones are learned plainly only."""

    def problems(self, recipe) -> Iterator[Problem]:
        yield from super().problems(recipe)
        if self.min_answer_tokens < 1:
            yield Problem("objective.min_answer_tokens", f"{self.min_answer_tokens} must be 1 or more")
        if self.isolate_copies and self.sft_layout != "concat":
            yield Problem("objective.isolate_copies", "separates copies that share a row; it needs sft_layout=concat")
        if self.sft_layout is not None and self.loss_on != "all_targets":
            yield Problem(
                "objective.loss_on",
                "with sft_layout the clean copy is learned whole and the masked one at its masked tokens; leave it out",
            )
        if self.rng == "upstream_cycle51" and self.sft_layout is not None:
            yield Problem("objective.rng", "upstream_cycle51 is the pretraining script's; with sft_layout use per_row")
        if self.rng == "upstream_cycle51" and (self.eligible != "all" or self.exclude):
            yield Problem(
                "objective.rng",
                "upstream_cycle51 draws positions without looking at the tokens: set eligible=all and exclude=[]",
            )


class Meap(CorruptedInputs):
    count = "exact"

    def prepare(self, batch: Batch, *, seed: int, step: int) -> Prepared:
        if self.config.sft_layout is None:
            return super().prepare(batch, seed=seed, step=step)
        self.refuse_masks(batch)
        return self.with_copies(batch, self.ratio_at(seed, step), seed)

    def corrupted(self, batch: Batch, ratio: float, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
        if self.config.rng == "per_row" or ratio == 0:
            return super().corrupted(batch, ratio, seed=seed, step=step)
        pattern = torch.from_numpy(upstream_cycle51(step, batch.input_ids.shape[1], ratio))
        where = pattern & (batch.role != PAD)
        return torch.where(where, self.noise.draw(row_generators(batch, seed), len(pattern)), batch.input_ids), where

    def with_copies(self, batch: Batch, ratio: float, seed: int) -> Prepared:
        """The fine-tuning form. Both terms are divided by the number of all targets, those of clean answers and the
        masked ones together."""
        answer = answers(batch)
        eligible = self.eligible(batch) & (batch.labels != -100)
        size = torch.bincount(answer.flatten(), weights=eligible.flatten().double())
        eligible &= size[answer] >= self.config.min_answer_tokens
        ids, where = corrupt(
            batch.input_ids,
            eligible,
            ratio,
            count=self.count,
            noise=self.noise,
            generators=row_generators(batch, seed),
            group=answer,
        )
        clean, masked = Targets.of(batch), Targets.of(batch, where)
        inputs, of_clean, of_masked = self.lay_out(batch, ids, where, clean, masked)
        inputs |= scored("clean_copy", of_clean, clean, None)
        inputs |= scored("masked_copy", of_masked, masked, self.mask_token_id)
        together = len(clean.ids) + len(masked.ids)
        terms = {"clean_copy": Term(together, targets=len(clean.ids))}
        terms["masked_copy"] = Term(together, targets=len(masked.ids))
        return Prepared(inputs, terms, {"mask_ratio": ratio})

    def lay_out(self, batch: Batch, ids: Tensor, where: Tensor, clean: Targets, masked: Targets):
        """The model's inputs, and the flat indices of the outputs that predict the clean and the masked targets.
        `separate`: a row more for each row with masked tokens; `concat`: rows of 2T, where anything is masked."""
        rows, length = batch.input_ids.shape
        doc, pos = batch.doc_ids, batch.position_ids
        copied = where.any(1)
        if self.config.sft_layout == "separate" or not bool(copied.any()):
            ids, doc, pos = (torch.cat([a, b[copied]]) for a, b in ((batch.input_ids, ids), (doc, doc), (pos, pos)))
            of_clean = clean.row * length + clean.col - 1
            number = rows + copied.long().cumsum(0) - 1  # row of each row's copy
            of_masked = number[masked.row] * length + masked.col - 1
        else:
            behind = torch.zeros_like(doc) if self.config.isolate_copies else lengths(batch)
            other = int(doc.max()) + 1 if self.config.isolate_copies else 0
            self._refuse_too_long(length)
            ids = torch.cat([batch.input_ids, ids], 1)
            doc, pos = torch.cat([doc, doc + other], 1), torch.cat([pos, pos + behind], 1)
            of_clean = clean.row * 2 * length + clean.col - 1
            of_masked = masked.row * 2 * length + length + masked.col - 1
        inputs = {"input_ids": ids, "position_ids": pos, "layout": Layout.causal(doc, pos)}
        return inputs, of_clean, of_masked

    def _refuse_too_long(self, length: int) -> None:
        """Copies that follow their sample have positions of up to two rows."""
        limit = self.facts.positions
        if not self.config.isolate_copies and limit is not None and 2 * length > limit:
            raise UserError(
                Problem(
                    "objective.sft_layout",
                    f"concat puts two copies of up to {length} tokens behind each other, and the model has {limit} "
                    f"positions; set isolate_copies=true, sft_layout=separate, or data.seq_len={limit // 2}",
                )
            )


def answers(batch: Batch) -> Tensor:
    """[B, T] int64 number, over the batch, of the run of given or of learned tokens each token is in; a run ends with its
    document. In a conversation every turn is a run."""
    change = batch.position_ids == 0
    change[:, 0] = True
    change[:, 1:] |= batch.role[:, 1:] != batch.role[:, :-1]
    return (change.flatten().long().cumsum(0) - 1).view_as(change)


def lengths(batch: Batch) -> Tensor:
    """[B, T] int64 length of each token's document."""
    count = torch.zeros_like(batch.doc_ids).scatter_add_(1, batch.doc_ids, torch.ones_like(batch.doc_ids))
    return count.gather(1, batch.doc_ids)


@objectives.register("meap")
def meap(config: MeapConfig, facts: Facts) -> Meap:
    return Meap(config, facts)
