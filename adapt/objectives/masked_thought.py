"""Masked Thought fine-tuning (Chen et al., ACL 2024, arXiv 2403.02178, equation 1).

Answer tokens (never the prompt; EOS too) are corrupted independently with probability p before they go in, and all
clean answer tokens are learned. p rises over the first two thirds of the stage and then stays. It regularises answers
with long dependencies (reasoning step by step); other data does not profit, and it needs more epochs than plain
fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from adapt.components import objectives
from adapt.data.batch import Batch
from adapt.errors import Problem
from adapt.models.layout import Layout
from adapt.objectives.base import Facts
from adapt.objectives.corrupted_inputs import CorruptedInputs, without_masks
from adapt.objectives.corruption import Corruption, Excluded, Ramp, random_ratio


@dataclass(frozen=True, kw_only=True)
class MaskedThoughtConfig(Corruption):
    ratio: float = 0.4
    """Probability p with which an answer token is corrupted: 0.4 on GSM8K, 0.2 on MATH, MetaMath and MAmmoTH (Llama-2;
    table 8)."""
    ratio_schedule: Ramp | None = field(default_factory=Ramp)
    """How p rises from `start`; null: constant (small ratios work without a warm-up)."""
    eligible: Literal["all", "assistant"] = "assistant"
    """`assistant`: answer tokens only. `all` corrupts prompts too, which the paper found harmful."""
    exclude: tuple[Excluded, ...] = ()
    """Answer tokens left alone: `special` (EOS, chat markers), `first_of_doc`, `last` (no target is predicted from
    it). The paper corrupts all."""
    random_ratio: bool = False
    """Draw the ratio uniformly between 0 and p for every batch."""
    drop_mask: bool = False
    """Also hide mask tokens in attention: no other token sees them."""

    def problems(self, recipe) -> Iterator[Problem]:
        yield from super().problems(recipe)
        if self.drop_mask and self.replace_rate == 1:
            yield Problem(
                "objective.drop_mask", "with replace_rate=1 there are no mask tokens to hide; set one of the two back"
            )


class MaskedThought(CorruptedInputs):
    count = "bernoulli"

    def ratio_at(self, seed: int, step: int) -> float:
        highest = super().ratio_at(seed, step)
        return random_ratio(highest, seed, step) if self.config.random_ratio else highest

    def layout(self, batch: Batch, ids: Tensor, where: Tensor) -> Layout:
        if self.config.drop_mask:
            return without_masks(batch, ids, self.mask_token_id)
        return super().layout(batch, ids, where)


@objectives.register("masked_thought")
def masked_thought(config: MaskedThoughtConfig, facts: Facts) -> MaskedThought:
    return MaskedThought(config, facts)
