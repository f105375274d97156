"""Shapes of latent attention, its ranks and what its cache costs (x-ecomla spec, sections 1, 2.6 and 5). No weights.

Legend: d hidden size, n_h query heads, n_kv key/value heads, d_h head size of the teacher; r_q, r_kv ranks; d_n, d_r
dimensions of a head without and with RoPE; d_v = d_h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MULTIPLE = 8
"""Ranks are multiples of this: what kernels need of a dimension."""


@dataclass(frozen=True)
class TeacherShape:
    """The attention that is converted."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int

    @staticmethod
    def of(config: Any) -> TeacherShape:
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return TeacherShape(config.hidden_size, heads, getattr(config, "num_key_value_heads", None) or heads, head_dim)

    @property
    def cache(self) -> int:
        """Elements per token and layer."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class LatentShape:
    """One converted layer."""

    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    q_rank: int | None = None
    """Null: one dense query projection."""

    @property
    def cache(self) -> int:
        """Elements per token and layer: the latent and the shared RoPE key, nothing per head."""
        return self.kv_rank + self.rope_dim


def kv_ratio(layers: list[LatentShape | None], teacher: TeacherShape) -> float:
    """Cache of the student over the teacher's; None is a layer that stays as it is."""
    return sum(teacher.cache if s is None else s.cache for s in layers) / (len(layers) * teacher.cache)


def rank_for(share: float, teacher: TeacherShape, rope_dim: int) -> int:
    """The largest r_kv with (r_kv + d_r) at most `share` of the teacher's cache; 0 where d_r alone is more."""
    return max(0, int(share * teacher.cache + 1e-6) - rope_dim) // MULTIPLE * MULTIPLE


def full_kv_rank(teacher: TeacherShape, key_dim: int) -> int:
    """Rank of `key_dim` dimensions of the keys and the values together: more would be zeros."""
    return min(teacher.hidden, teacher.kv_heads * (key_dim + teacher.head_dim))


def most_kv_rank(teacher: TeacherShape, key_dim: int, *, ballast: bool) -> int:
    """With a channel for a constant, which holds nothing of them; a multiple of 8 then."""
    full = full_kv_rank(teacher, key_dim)
    return (full + 1) // MULTIPLE * MULTIPLE if ballast else full


def full_q_rank(teacher: TeacherShape) -> int:
    return min(teacher.hidden, teacher.heads * teacher.head_dim)


def round_up(rank: int, full: int) -> int:
    """To a multiple of 8, and no further than full rank."""
    return min(full, -(-rank // MULTIPLE) * MULTIPLE)


def parity_q_rank(teacher: TeacherShape, kv_rank: int, nope_dim: int, rope_dim: int) -> int:
    """r_q at which the converted layer has as many parameters as the teacher's (it reproduces the authors' 1B ranks):
    the largest multiple of 16 that leaves 10 to spare."""
    t = teacher
    theirs = t.hidden * t.heads * t.head_dim + 2 * t.hidden * t.kv_heads * t.head_dim
    latent = t.hidden * (kv_rank + rope_dim) + kv_rank * t.heads * (nope_dim + t.head_dim)
    exact = (theirs - latent) / (t.hidden + t.heads * (nope_dim + rope_dim))
    return int(exact - 10) // 16 * 16
