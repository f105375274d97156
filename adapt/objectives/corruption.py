"""Inputs that are corrupted while their targets stay clean: what MEAP and Masked Thought share.

Only `input_ids` change, after packing and after the labels are made; positions, documents and attention do not. It stays
next-token prediction: the clean token at a corrupted position m is predicted from position m - 1, never from m itself.

Sources: MEAP (arXiv 2502.07490), Masked Thought (arXiv 2403.02178). Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from adapt.conversion.mask_token import MaskTokenConfig
from adapt.data.batch import PAD, TARGET, Batch
from adapt.data.noise import generator
from adapt.errors import Problem
from adapt.objectives.blocks import noise_keys

CORRUPT, RATIO = 3, 4
"""Last words of noise keys, apart from those of other draws."""

Excluded = Literal["special", "first_of_doc", "last"]


@dataclass(frozen=True, kw_only=True)
class Ramp:
    start: float = 0.0
    """Ratio at the stage's first step."""
    warmup_frac: float = 0.66
    """Fraction of the stage's steps over which the ratio goes from `start` to `ratio`, where it stays."""

    def at(self, end: float, step: int, total: int) -> float:
        """The ratio at an optimizer step of `total`: end * step / (w * total + 1) up to `end`, from a start of 0
        (Masked Thought's trainer; the paper says "two thirds")."""
        done = step / (self.warmup_frac * total + 1)
        return end if done >= 1 else self.start + (end - self.start) * done


@dataclass(frozen=True, kw_only=True)
class Corruption:
    ratio: float
    """Fraction of the eligible inputs that are corrupted."""
    ratio_schedule: Ramp | None = None
    """How the ratio gets there over the stage's steps; null: constant."""
    eligible: Literal["all", "assistant"] = "all"
    """Which inputs may be corrupted: `all` but padding, or (`assistant`) only learned ones, never a prompt."""
    exclude: tuple[Excluded, ...] = ("special", "first_of_doc", "last")
    """Which are left alone besides: special tokens, the first of each document, the last of each (no target is
    predicted from it)."""
    replace_rate: float = 0.0
    """Fraction of the corrupted inputs that become a random token of the vocabulary; the others become the mask
    token. 0: masks only, 1: random tokens only."""
    loss_on: Literal["all_targets", "corrupted", "clean_targets"] = "all_targets"
    """Which targets are learned: all, those at corrupted positions, or those at intact ones."""

    def problems(self, recipe) -> Iterator[Problem]:
        ramp = self.ratio_schedule
        rates = {"ratio": self.ratio, "replace_rate": self.replace_rate}
        rates |= {} if ramp is None else {"ratio_schedule.start": ramp.start}
        for key, value in rates.items():
            if not 0 <= value <= 1:
                yield Problem(f"objective.{key}", f"{value} is a fraction: from 0 to 1")
        if ramp is not None and not 0 < ramp.warmup_frac <= 1:
            yield Problem(
                "objective.ratio_schedule.warmup_frac",
                f"{ramp.warmup_frac} is a fraction of the stage's steps: above 0, at most 1; for a constant ratio set "
                "ratio_schedule=null",
            )
        if self.loss_on == "corrupted" and self.ratio == 0:
            yield Problem("objective.loss_on", "with ratio=0 nothing is corrupted, so nothing would be learned")
        if self.replace_rate < 1 and not any(isinstance(c.config, MaskTokenConfig) for c in recipe.model.conversions):
            yield Problem(
                "model.conversions",
                "corrupted inputs become a mask token, and the model is given none; add `- mask_token` (or "
                "`- {name: mask_token, token: ...}`), or set objective.replace_rate=1 for random tokens alone",
            )

    def ratio_at(self, step: int, total_steps: int | None) -> float:
        if self.ratio_schedule is None:
            return self.ratio
        if total_steps is None:
            raise ValueError("a ratio that rises over a stage needs the number of its steps")
        return self.ratio_schedule.at(self.ratio, step, total_steps)


@dataclass(frozen=True, eq=False)
class Substitute:
    """What a corrupted input becomes."""

    mask_token_id: int | None
    """None only with a `replace_rate` of 1."""
    replace_rate: float = 0.0
    ordinary: np.ndarray | None = None
    """[n] int64 ids random tokens are drawn from, uniformly; read only where `replace_rate` is above 0."""

    def draw(self, generators: Sequence[np.random.Generator], length: int) -> Tensor:
        """[B, length] int64: what each position would become."""
        shape = (len(generators), length)
        if self.replace_rate == 0:
            return torch.full(shape, self.mask_token_id)
        found = np.empty(shape, np.int64)
        for row, rng in enumerate(generators):
            random = self.ordinary[rng.integers(len(self.ordinary), size=length)]
            replaced = rng.random(length) < self.replace_rate
            found[row] = random if self.replace_rate == 1 else np.where(replaced, random, self.mask_token_id)
        return torch.from_numpy(found)


def corrupt(
    ids: Tensor,
    eligible: Tensor,
    ratio: float,
    *,
    count: Literal["exact", "bernoulli"],
    noise: Substitute,
    generators: Sequence[np.random.Generator],
    group: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ids [B, T] int64, eligible [B, T] bool -> corrupted ids [B, T], corrupted positions M [B, T] bool.

    `bernoulli`: each eligible position with probability `ratio`. `exact`: max(1, floor(ratio x eligible)) of each row's,
    or of each `group`'s ([B, T] int64, numbered from 0 over the batch), without replacement; none where nothing is
    eligible or the ratio is 0. Row b draws from `generators[b]` alone, so M depends on no other row.
    """
    length = ids.shape[1]
    allowed = eligible.numpy()
    uniform = np.stack([rng.random(length) for rng in generators])
    if count == "bernoulli":
        chosen = allowed & (uniform < ratio)
    else:
        if group is None:
            group = torch.arange(len(ids))[:, None].expand_as(ids)
        chosen = allowed & (ratio > 0) & _lowest(uniform, allowed, ratio, group.numpy())
    where = torch.from_numpy(chosen)
    return torch.where(where, noise.draw(generators, length), ids), where


def _lowest(uniform: np.ndarray, allowed: np.ndarray, ratio: float, group: np.ndarray) -> np.ndarray:
    """[B, T] bool: the eligible positions of each group with the lowest numbers, max(1, floor(ratio x eligible))."""
    flat = group.ravel()
    order = np.lexsort((np.where(allowed, uniform, 2.0).ravel(), flat))  # group by group, each in rising order
    size = np.bincount(flat)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(size) - size, size)
    wanted = np.maximum(1, np.floor(ratio * np.bincount(flat, weights=allowed.ravel()))).astype(np.int64)
    return (rank < wanted[flat]).reshape(group.shape)


def upstream_cycle51(step: int, length: int, ratio: float) -> np.ndarray:
    """[length] bool: the positions MEAP's training scripts mask at a step, the same in every row of the run. They reseed
    Python's generator with 50 + step % 51, so there are 51 patterns; here it is a generator of its own."""
    import random

    chosen = random.Random(50 + step % 51).sample(range(length - 1), max(1, int(length * ratio)))
    found = np.zeros(length, dtype=bool)
    found[chosen] = True
    return found


def eligible_inputs(batch: Batch, config: Corruption, special: np.ndarray | None) -> Tensor:
    """[B, T] bool: inputs that may be corrupted."""
    allowed = batch.role == TARGET if config.eligible == "assistant" else batch.role != PAD
    if "special" in config.exclude:
        allowed &= ~torch.isin(batch.input_ids, torch.from_numpy(special))
    if "first_of_doc" in config.exclude:
        allowed &= batch.position_ids != 0
    if "last" in config.exclude:
        allowed[:, :-1] &= batch.doc_ids[:, 1:] == batch.doc_ids[:, :-1]
        allowed[:, -1] = False
    return allowed


def row_generators(batch: Batch, seed: int) -> list[np.random.Generator]:
    """One for each row, keyed by (seed, source, epoch, sample index): the same on any world size, split or resume."""
    return [generator(seed, *key, CORRUPT) for key in noise_keys(batch)]


def random_ratio(highest: float, seed: int, step: int) -> float:
    """Uniform in [0, highest), one draw per optimizer step, the same on all ranks and for all microbatches."""
    return highest * float(generator(seed, step, 0, 0, RATIO).random())
