"""Which candidates of a block are revealed in one denoising step.

A rule is a plain function `(candidates, open, step) -> reveal`, both [R, K] bool: `open` are the slots that may be
written, columns from left to right. The sampler itself keeps closed slots closed. A rule reveals at least one open
slot of every row that has one, or decoding would not end.

Legend: R rows, K slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adapt.generation.sampling import Candidates


@dataclass(frozen=True)
class Step:
    """What a rule may go by besides the candidates."""

    threshold: float
    count: Tensor | None = None
    """[R] int64 slots a row reveals per step, for rules that reveal a fixed number."""
    lots: Tensor | None = None
    """[R, K] uniform numbers, for rules that leave it to chance."""


Rule = Callable[[Candidates, Tensor, Step], Tensor]


def confidence(candidates: Candidates, open: Tensor, step: Step) -> Tensor:
    """All slots whose candidate is more probable than `threshold`, and always the best one."""
    return (candidates.confidence > step.threshold) | best(candidates.confidence, open)


def topk(candidates: Candidates, open: Tensor, step: Step) -> Tensor:
    """The `count` slots with the most probable candidates; the leftmost of equals."""
    score = candidates.confidence.masked_fill(~open, float("-inf"))
    order = score.argsort(dim=1, descending=True, stable=True)
    return open & (order.argsort(1) < step.count[:, None])


def entropy(candidates: Candidates, open: Tensor, step: Step) -> Tensor:
    """The slot whose distribution is the narrowest."""
    return best(-torch.special.entr(candidates.probabilities).sum(-1), open)


def margin(candidates: Candidates, open: Tensor, step: Step) -> Tensor:
    """The slot whose most probable token is the furthest ahead of the next."""
    two = candidates.probabilities.topk(2, dim=-1).values
    return best(two[..., 0] - two[..., 1], open)


def sequential(candidates: Candidates, open: Tensor, step: Step) -> Tensor:
    """The leftmost open slot."""
    return open & (open.cumsum(1) == 1)


def random(candidates: Candidates, open: Tensor, step: Step) -> Tensor:
    """Any one slot, by lot."""
    return best(step.lots, open)


RULES: dict[str, Rule] = {
    "confidence": confidence,
    "topk": topk,
    "entropy": entropy,
    "margin": margin,
    "sequential": sequential,
    "random": random,
}


def best(score: Tensor, open: Tensor) -> Tensor:
    """[R, K] bool: the open slot with the highest score of each row; the leftmost of equals."""
    score = score.masked_fill(~open, float("-inf"))
    chosen = torch.zeros_like(open).scatter(1, score.argmax(1, keepdim=True), True)
    return chosen & open


def leftmost_group(open: Tensor, size: int | None) -> Tensor:
    """[R, W] bool: the open slots of each row's first group of `size` slots that has any; None: all open slots."""
    if size is None:
        return open
    group = torch.arange(open.shape[1], device=open.device) // size
    first = open.long().argmax(1) // size
    return open & (group == first[:, None])
