"""LAWCAT: attention layers become normalised gated linear attention over short convolutions, with the teacher's
projections untouched (Liu et al. 2025, arXiv 2509.18467; adapt/models/gated_linear.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from adapt.components import conversions
from adapt.conversion.recurrent import Recurrent, mixer_problems, text_for_steps
from adapt.errors import Problem, UserError


@dataclass(frozen=True, kw_only=True)
class LawcatConfig:
    layers: str | tuple[int, ...] = "all"
    """Layers to convert: `all`, a list of ids from 0, `every_N` (0, N, 2N, ...), or `auto`: all but those whose heads are
    hardest to imitate, which a short attention transfer on the training text finds out."""
    keep: str | tuple[int, ...] = "none"
    """Layers that keep their attention, whatever `layers` says: a list, or `every_N` (N-1, 2N-1, ...): with `every_4`
    one layer in four stays."""
    attention_share: float | None = None
    """Of all layers, the share that keeps its attention under `layers: auto`, those of `keep` included. null: 0.25."""
    auto_steps: int = 24
    """Steps of two rows, of which `layers: auto` learns from three quarters and measures on the others."""
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
        if self.gate_rank is not None and self.gate_rank < 1:
            yield Problem("", f"gate_rank={self.gate_rank} must be 1 or more; null is a full map")
        yield from mixer_problems(self, recipe)


class Lawcat(Recurrent):
    mixer = "gated_linear"

    def options(self, config):
        c, head_dim = self.config, _head_dim(config)
        if c.gate == "channel" and (c.features * 2 if c.features is not None else head_dim // 2 * 2) != head_dim:
            made = c.features or head_dim // 2
            raise UserError(
                Problem(
                    "features",
                    f"a channel gate has one decay for each of a head's {head_dim} channels, and {made} features make "
                    f"{2 * made} keys; leave it out, or use gate: head",
                )
            )
        return {
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


@conversions.register("lawcat")
def lawcat(config: LawcatConfig, recipe) -> Lawcat:
    return Lawcat(config, recipe.run.seed, text_for_steps(recipe))


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
