"""Which candidates of a block are revealed in one denoising step.

A rule is a plain function `(candidates, open, options) -> reveal`, both [R, K] bool: `open` are the slots
that may be written, columns from left to right; `options` is the sampler's config. The sampler itself keeps
closed slots closed. A rule reveals at least one open slot of every row that has one, or decoding would not
end.

Legend: R rows, K slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adapt.generation.sampling import Candidates

Rule = Callable[[Candidates, Tensor, Any], Tensor]


def confidence(candidates: Candidates, open: Tensor, options: Any) -> Tensor:
    """All slots whose candidate is more probable than `threshold`, and always the best one."""
    return (candidates.confidence > options.threshold) | best(candidates.confidence, open)


def sequential(candidates: Candidates, open: Tensor, options: Any) -> Tensor:
    """The leftmost open slot: one per step."""
    return open & (open.cumsum(1) == 1)


RULES: dict[str, Rule] = {"confidence": confidence, "sequential": sequential}


def best(score: Tensor, open: Tensor) -> Tensor:
    """[R, K] bool: the open slot with the highest score of each row; the leftmost of equals."""
    score = score.masked_fill(~open, float("-inf"))
    chosen = torch.zeros_like(open).scatter(1, score.argmax(1, keepdim=True), True)
    return chosen & open
