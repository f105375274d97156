"""Which tokens of a row are hidden: the forward process of masked diffusion. Legend: B rows, T clean tokens of a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from adapt.data.batch import PAD, Batch
from adapt.data.noise import generator
from adapt.errors import Problem
from adapt.objectives.blocks import Blocks, noise_keys


@dataclass(frozen=True, kw_only=True)
class Noise:
    granularity: Literal["block", "document", "row"] = "block"
    """What shares one t. `block`: NBDiff, BD3-LM, Fast-dLLM v2; `document`: SDAR; `row`: dLLM, LLaDA2."""
    t_min: float = 0.0
    """Lowest t drawn; t is uniform in [t_min, t_max], stratified over a row's blocks (documents)."""
    t_max: float = 1.0
    """Highest t drawn. t_min = t_max = 1 hides everything that may be hidden (I-DLM)."""
    search: bool = False
    """Take [t_min, t_max] from the `noise_interval` suite: the interval in which the loss varies least at each
    evaluation (BD3-LM, section 5.3). The two above are where training starts."""
    epsilon: float = 1e-3
    """A token is hidden with probability (1 - epsilon) t + epsilon."""
    complementary: bool = False
    """Show each row twice, hiding in the second view what the first one showed (Fast-dLLM v2)."""

    def problems(self) -> Iterator[Problem]:
        where = "objective.noise"
        if not 0 < self.epsilon < 1:
            yield Problem(f"{where}.epsilon", f"{self.epsilon} must be between 0 and 1; the usual value is 0.001")
        if not 0 <= self.t_min <= self.t_max <= 1:
            yield Problem(
                f"{where}.t_min", f"t_min={self.t_min}, t_max={self.t_max} must satisfy 0 <= t_min <= t_max <= 1"
            )


@dataclass(frozen=True)
class Mask:
    hidden: Tensor
    """[B, T] bool."""
    probability: Tensor
    """[B, T] float32, with which each token was hidden, if it may be."""

    def complement(self, maskable: Tensor) -> Mask:
        return Mask(maskable & ~self.hidden, 1 - self.probability)


def stratified(count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` draws from [0, 1), one in each of `count` equal strata up to a common offset, in random order."""
    order, jitter, offset = rng.permutation(count), rng.random(count), rng.random()
    return ((order + jitter) / count + offset) % 1.0


def draw(batch: Batch, blocks: Blocks, maskable: Tensor, noise: Noise, seed: int, t: float | None = None) -> Mask:
    """t per block (document, row), then each maskable token with probability (1 - epsilon) t + epsilon.

    Drawn per row from (seed, source, epoch, sample index) alone. A given `t` replaces the draw and is used as it is.
    """
    rows, length = batch.input_ids.shape
    starts = {"block": blocks.first, "document": batch.position_ids == 0}.get(noise.granularity)
    starts = (torch.zeros_like(blocks.first) if starts is None else starts).numpy().copy()
    starts[:, 0], real = True, (batch.role != PAD).numpy()
    hidden = np.zeros((rows, length), dtype=bool)
    probability = np.full((rows, length), t, dtype=np.float64) if t is not None else np.empty((rows, length))
    for row, key in enumerate(noise_keys(batch)):
        rng = generator(seed, *key)
        group = np.cumsum(starts[row]) - 1  # numbered along the row; padding has none of its own
        count = int(group[real[row]].max(initial=0)) + 1
        group, u = np.minimum(group, count - 1), stratified(count, rng)
        if t is None:
            drawn = noise.t_min + (noise.t_max - noise.t_min) * u
            probability[row] = ((1 - noise.epsilon) * drawn + noise.epsilon)[group]
        hidden[row] = rng.random(length) < probability[row]
    return Mask(torch.from_numpy(hidden) & maskable, torch.from_numpy(probability).float())
