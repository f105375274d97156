"""NBDiff: block diffusion with a context-causal mask, the AR shift kept, an AR loss on the clean stream, and growing
blocks (arXiv 2512.06776, eq. 1-5).

The row goes in twice, noisy copy first: `[x~ | x]`, both with the same positions. Noisy tokens see their own noisy
block and the clean blocks before it; clean tokens are plainly causal, so the same pass yields the AR logits. The
output at i-1 predicts x_i in both streams. Block-first tokens are never masked: the AR stream predicts them, as it
does in decoding; at block size 1 nothing is masked and the objective is exactly `ar_weight` x the AR loss.

Legend: B rows, T clean tokens of a row, b block size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapt.components import objectives
from adapt.data.batch import TARGET, Batch
from adapt.data.noise import generator
from adapt.errors import Problem
from adapt.losses.linear_cross_entropy import linear_cross_entropy
from adapt.models import attention
from adapt.models.layout import Layout
from adapt.objectives.base import Facts, Models, Prepared, Targets, Term, flat_rows


@dataclass(frozen=True, kw_only=True)
class Growth:
    """b(s) = min(block_size, start * factor ^ floor(max(0, s - after) / every))  (eq. 3)."""

    start: int = 1
    """First block size. 1 trains the AR loss alone (nothing can be masked); without AR loss start at 2."""
    factor: int = 2
    """Each plateau multiplies the block size by this."""
    every: int = 500
    """Optimizer steps per plateau."""
    after: int = 0
    """Steps before the first plateau begins to count."""


@dataclass(frozen=True, kw_only=True)
class BlockDiffusionConfig:
    block_size: int = 32
    """Target block size b; what decoding will use."""
    growth: Growth | None = field(default_factory=Growth)
    """How the block size grows; null trains at `block_size` from the first step."""
    ar_weight: float = 0.5
    """Weight of the AR loss on the clean stream, relative to the diffusion loss; both are divided by the same number
    of supervised tokens, so 0.5 matches the expected half of the tokens that are masked."""
    ar_weight_end: float | None = None
    """AR weight at the target block size; in between it follows the logarithm of the block size. null: constant."""
    epsilon: float = 1e-3
    """Masking probability is (1 - epsilon) t + epsilon, t uniform in [0, 1] and stratified over a row's blocks."""

    def problems(self, recipe) -> Iterator[Problem]:
        if self.block_size < 1:
            yield Problem("objective.block_size", f"{self.block_size} tokens is no block; 8 to 32 is usual")
        if self.block_size > recipe.data.seq_len:
            yield Problem(
                "objective.block_size",
                f"{self.block_size} is longer than a row (data.seq_len={recipe.data.seq_len}), so no block would ever "
                f"be whole; lower it or raise data.seq_len",
            )
        if not 0 < self.epsilon < 1:
            yield Problem("objective.epsilon", f"{self.epsilon} must be between 0 and 1; the usual value is 0.001")
        for key in ("ar_weight", "ar_weight_end"):
            value = getattr(self, key)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                yield Problem(f"objective.{key}", f"{value} must be a finite number, 0 or more")
        first = self.block_size if self.growth is None else self.growth.start
        if first == 1 and self.ar_weight == 0:
            yield Problem(
                "objective.growth.start",
                "at block size 1 nothing can be masked, and with ar_weight=0 there is no loss at all: start at 2, or "
                "give ar_weight",
            )
        if self.growth is not None:
            yield from self._growth_problems()
        if not any(c.name == "mask_token" for c in recipe.model.conversions):
            yield Problem(
                "model.conversions",
                "block diffusion needs a mask token; add `- mask_token` (or `- {name: mask_token, token: ...}`)",
            )

    def _growth_problems(self) -> Iterator[Problem]:
        growth = self.growth
        for key, least in (("start", 1), ("factor", 2), ("every", 1), ("after", 0)):
            value = getattr(growth, key)
            if value < least:
                yield Problem(f"objective.growth.{key}", f"{value} must be {least} or more")
        if growth.start > self.block_size:
            yield Problem(
                "objective.growth.start",
                f"{growth.start} is already beyond the target block_size={self.block_size}; blocks only grow",
            )


def block_size_at(config: BlockDiffusionConfig, step: int) -> int:
    """b(s), a pure function of the optimizer step."""
    growth = config.growth
    if growth is None:
        return config.block_size
    doublings = max(0, step - growth.after) // growth.every
    size = growth.start
    while doublings > 0 and size < config.block_size:  # no overflow after a long plateau
        size, doublings = size * growth.factor, doublings - 1
    return min(size, config.block_size)


def ar_weight_at(config: BlockDiffusionConfig, step: int) -> float:
    if config.ar_weight_end is None:
        return config.ar_weight
    first = config.block_size if config.growth is None else config.growth.start
    span = math.log(config.block_size / first)
    done = 1.0 if span == 0 else math.log(block_size_at(config, step) / first) / span
    return config.ar_weight + done * (config.ar_weight_end - config.ar_weight)


def stratified(count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` draws from [0, 1), one in each of `count` equal strata up to a common offset, in random order."""
    order, jitter, offset = rng.permutation(count), rng.random(count), rng.random()
    return ((order + jitter) / count + offset) % 1.0


def draw_mask(
    batch: Batch, block: Tensor, maskable: Tensor, epsilon: float, seed: int, t: float | None = None
) -> Tensor:
    """Which tokens are masked, [B, T] bool: t per block, then each maskable token with probability (1-eps) t + eps.

    Drawn per row from (seed, source, epoch, sample index) alone. A given `t` replaces the draw and is used as it is.
    """
    rows, length = batch.input_ids.shape
    masked = np.zeros((rows, length), dtype=bool)
    starts = np.ones((rows, length), dtype=bool)
    doc, blk = batch.doc_ids.numpy(), block.numpy()
    starts[:, 1:] = (doc[:, 1:] != doc[:, :-1]) | (blk[:, 1:] != blk[:, :-1])
    for row in range(rows):
        key = (int(batch.source[row]), int(batch.epoch[row]), int(batch.sample_index[row]))
        rng = generator(seed, *key)
        index = np.cumsum(starts[row]) - 1  # the block of each token, numbered along the row
        probability = (1 - epsilon) * stratified(int(index[-1]) + 1, rng) + epsilon
        draws = rng.random(length)
        masked[row] = draws < (probability[index] if t is None else t)
    return torch.from_numpy(masked) & maskable


class BlockDiffusion:
    needs_teacher = False

    def __init__(self, config: BlockDiffusionConfig, facts: Facts, fixed: tuple[int, float] | None = None):
        """`fixed` = (block size, t) measures instead of trains: no schedule, and every block gets this t."""
        if facts.mask_token_id is None:
            raise ValueError("block diffusion needs a model with a mask token (conversion `mask_token`)")
        self.config, self.fixed = config, fixed
        self.mask_token_id, self.backend = facts.mask_token_id, facts.attention

    def prepare(self, batch: Batch, *, seed: int, step: int) -> Prepared:
        size, t = self.fixed or (block_size_at(self.config, step), None)
        ar_weight = 0.0 if self.fixed else ar_weight_at(self.config, step)
        block = batch.position_ids // size
        maskable = (batch.role == TARGET) & (batch.labels != -100) & (batch.position_ids % size != 0)
        masked = draw_mask(batch, block, maskable, self.config.epsilon, seed, t)
        noisy, clean = Targets.of(batch, masked), Targets.of(batch)
        length = batch.input_ids.shape[1]
        # Without a masked token the noisy copy teaches nothing, and leaving it out changes no clean logit.
        two_streams = len(noisy.ids) > 0
        width, clean_start = (2 * length, length) if two_streams else (length, 0)
        inputs: dict[str, Any] = {}
        if two_streams:
            corrupted = torch.where(masked, self.mask_token_id, batch.input_ids)
            inputs["input_ids"] = torch.cat([corrupted, batch.input_ids], 1)
            inputs["position_ids"] = torch.cat([batch.position_ids, batch.position_ids], 1)
            inputs["layout"] = Layout.noisy_then_clean(batch.doc_ids, batch.position_ids, block)
        else:
            inputs["input_ids"], inputs["position_ids"] = batch.input_ids, batch.position_ids
            inputs["layout"] = Layout.causal(batch.doc_ids, batch.position_ids)
        inputs |= {"masked": (noisy.row * width + noisy.col - 1, noisy.ids, noisy.weight)}
        # Both terms are divided by the number of supervised clean tokens, so that ar_weight means what it says.
        count = len(noisy.ids) if self.fixed else len(clean.ids)
        terms = {"masked": Term(count)}
        if ar_weight > 0:
            inputs |= {"ar": (clean.row * width + clean_start + clean.col - 1, clean.ids, clean.weight)}
            terms["ar"] = Term(count, ar_weight)
        info = {"block_size": size, "masked_fraction": len(noisy.ids) / max(1, len(clean.ids))}
        return Prepared(_movable(inputs), terms, info)

    def __call__(self, models: Models, inputs: dict[str, Any]) -> dict[str, Tensor]:
        student = models.student
        hidden = attention.hidden_states(
            student, inputs["input_ids"], inputs["position_ids"], inputs["layout"], self.backend
        )
        head = attention.head_weight(student)
        sums = {}
        for term, exclude in (("masked", self.mask_token_id), ("ar", None)):
            if f"{term}/source" not in inputs:
                continue
            rows = flat_rows(hidden, inputs[f"{term}/source"])
            target, weight = inputs[f"{term}/target"], inputs[f"{term}/weight"]
            sums[term] = linear_cross_entropy(rows, head, target, weight=weight, exclude=exclude)
        return sums

    def largest_step(self) -> int:
        growth = self.config.growth
        return 0 if growth is None else growth.after + growth.every * math.ceil(math.log2(self.config.block_size) + 1)

    def export_fields(self) -> dict[str, Any]:
        return {
            "block_size": self.config.block_size,
            "mask_token_id": self.mask_token_id,
            "prediction": "shifted",
            "context_mask": "causal",
        }


def _movable(inputs: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in inputs.items():
        if isinstance(value, tuple):
            flat |= {f"{key}/{part}": v for part, v in zip(("source", "target", "weight"), value, strict=True)}
        else:
            flat[key] = value
    return flat


@objectives.register("block_diffusion")
def block_diffusion(config: BlockDiffusionConfig, facts: Facts) -> BlockDiffusion:
    return BlockDiffusion(config, facts)


def fixed_t(config: BlockDiffusionConfig, facts: Facts, block_size: int, t: float) -> BlockDiffusion:
    """The measuring form: masked cross-entropy at one block size, every maskable token masked with probability t."""
    return BlockDiffusion(config, facts, (block_size, t))
