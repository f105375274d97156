"""LAWCAT: attention layers become normalised gated linear attention over short convolutions, with the teacher's
projections untouched (Liu et al. 2025, arXiv 2509.18467; adapt/models/gated_linear.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from adapt.components import conversions
from adapt.conversion.layer_map import planned
from adapt.errors import Problem, UserError


@dataclass(frozen=True, kw_only=True)
class LawcatConfig:
    layers: str | tuple[int, ...] = "all"
    """Layers to convert: `all`, a list of ids from 0, or `every_N` (0, N, 2N, ...)."""
    keep: str | tuple[int, ...] = "none"
    """Layers that keep their attention, whatever `layers` says: a list, or `every_N` (N-1, 2N-1, ...): with `every_4`
    one layer in four stays."""
    gate: Literal["channel", "head"] = "channel"
    """Decays: one for each key channel, or one for each head (simple GLA: faster, and less to learn)."""
    gate_rank: int | None = 16
    """Rank of the map from hidden state to decays; null: full."""
    gate_bias: float = 0.0
    """Where the decays' bias starts. 0 (as published) forgets half in 16 tokens, 4 in 611, 6 in 4,480, 8 in 33,000."""
    features: int | None = None
    """Features of a head before they are doubled; null: half the head size, the only number a channel gate can take."""
    tied: bool = True
    """One feature map for queries and keys."""
    conv_width: int = 4
    """Taps of the convolutions on queries and keys."""
    conv_silu: bool = False
    """SiLU after the convolutions."""
    rope: Literal["none", "before_conv"] = "none"
    """`before_conv`: queries and keys are rotated as in the teacher; as published they are not."""
    chunk: int = 64
    """Tokens that training computes by matrix products at a time; a multiple of 16."""
    exact: bool = False
    """Chunks that are right for any decay: slower. Else a channel's decay stays above exp(-80 / chunk) a token."""

    def problems(self, recipe) -> Iterator[Problem]:
        if self.chunk < 16 or self.chunk % 16:
            yield Problem("", f"chunk={self.chunk} must be a multiple of 16; 64 is usual")
        if self.conv_width < 1:
            yield Problem("", f"conv_width={self.conv_width} must be 1 or more (1: the token alone); 4 is usual")
        if self.gate_rank is not None and self.gate_rank < 1:
            yield Problem("", f"gate_rank={self.gate_rank} must be 1 or more; null is a full map")
        yield from refuse_blocks(recipe)


class Lawcat:
    transfers = True

    def __init__(self, config: LawcatConfig, seed: int):
        self.config, self.seed = config, seed

    def plan(self, config, tokenizer):
        features, head_dim = self.config.features, _head_dim(config)
        if self.config.gate == "channel" and (features * 2 if features is not None else head_dim // 2 * 2) != head_dim:
            made = features or head_dim // 2
            raise UserError(
                Problem(
                    "features",
                    f"a channel gate has one decay for each of a head's {head_dim} channels, and {made} features make "
                    f"{2 * made} keys; leave it out, or use gate: head",
                )
            )
        c = self.config
        options = {
            "gate": c.gate,
            "gate_rank": c.gate_rank,
            "gate_bias": c.gate_bias,
            "features": c.features,
            "tied": c.tied,
            "conv_width": c.conv_width,
            "conv_silu": c.conv_silu,
            "rope": c.rope,
            "chunk": c.chunk,
            "exact": c.exact,
        }
        return planned(config, "gated_linear", c.layers, c.keep, options), tokenizer

    def apply(self, model, tokenizer):
        from adapt.conversion.mixers import with_mixers

        return with_mixers(model, self.plan(model.config, tokenizer)[0], self.seed)


@conversions.register("lawcat")
def lawcat(config: LawcatConfig, recipe) -> Lawcat:
    return Lawcat(config, recipe.run.seed)


def refuse_blocks(recipe) -> Iterator[Problem]:
    """A block sees itself both ways, and a recurrence runs from left to right."""
    if hasattr(recipe.objective.config, "block_size"):
        yield Problem(
            "",
            f"the objective {recipe.objective.name} looks both ways within a block, and a recurrent layer only back; "
            "train with next_token, logit_distillation or attention_transfer",
        )


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
