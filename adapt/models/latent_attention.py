"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values of all heads are linear maps of
one latent per token, and one more key carries the positions.

Two forms of the same function. *Expanded*: the latent is mapped to keys and values, and any attention kernel does the
rest; for training and prompts. *Absorbed*: the maps move to the queries and to the outputs, and attention reads the
latents themselves; for decoding, where it is the cache that costs. The cache holds r_kv + d_r numbers per token and
layer in both.

Parameters have DeepSeek's names and layout (RoPE pairs are neighbours), so that they load into transformers' DeepseekV3.

Legend: B rows, Q new tokens, S tokens in all, H heads, r rank of the latent, d_n and d_r dimensions of a head without and
with RoPE, d_v of its value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention import NAME, attention


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """What a layer's config says of it; ranks may differ from layer to layer."""

    hidden_size: int
    num_heads: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    q_rank: int | None = None
    """None: one dense query projection."""
    rope: dict[str, Any]
    """transformers' `rope_parameters`, for frequencies over d_r: `rope_theta`, and `rope_type` default, linear, llama3 or
    yarn."""
    q_norm: bool = False
    """RMSNorm of the query's latent."""
    kv_norm: bool = True
    """RMSNorm of the cached latent. The authors' released models have neither."""
    q_bias: bool = False
    """Of the last projection of the queries."""
    kv_bias: bool = False
    o_bias: bool = False
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        own = (self.nope_dim + self.rope_dim) ** -0.5
        everywhere = self.rope.get("mscale_all_dim") if self.rope.get("rope_type") == "yarn" else None
        return own * yarn_scale(self.rope["factor"], everywhere) ** 2 if everywhere else own

    @property
    def cache(self) -> int:
        """Numbers per token."""
        return self.kv_rank + self.rope_dim


class LatentNorm(nn.Module):
    """RMSNorm with DeepSeek's fixed epsilon, in fp32 (or wider)."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class LatentAttention(nn.Module):
    is_causal = True
    num_key_value_groups = 1

    def __init__(self, spec: LatentSpec, layer_idx: int, config: Any = None):
        """`config`: the model's, whose attention implementation the expanded form calls where no plan is given."""
        super().__init__()
        self.spec, self.layer_idx, self.config = spec, layer_idx, config
        heads = spec.num_heads
        queries = heads * (spec.nope_dim + spec.rope_dim)
        if spec.q_rank is None:
            self.q_proj = nn.Linear(spec.hidden_size, queries, bias=spec.q_bias)
        else:
            self.q_a_proj = nn.Linear(spec.hidden_size, spec.q_rank, bias=False)
            self.q_a_layernorm = LatentNorm(spec.q_rank) if spec.q_norm else nn.Identity()
            self.q_b_proj = nn.Linear(spec.q_rank, queries, bias=spec.q_bias)
        self.kv_a_proj_with_mqa = nn.Linear(spec.hidden_size, spec.kv_rank + spec.rope_dim, bias=spec.kv_bias)
        self.kv_a_layernorm = LatentNorm(spec.kv_rank) if spec.kv_norm else nn.Identity()
        self.kv_b_proj = nn.Linear(spec.kv_rank, heads * (spec.nope_dim + spec.v_dim), bias=False)
        self.o_proj = nn.Linear(heads * spec.v_dim, spec.hidden_size, bias=spec.o_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        plan: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [B, Q, d], position_ids [B or 1, Q] -> ([B, Q, d], None).

        attention_mask: None (causal), or [B, 1, Q, S] bool (true: visible) or additive, as transformers makes them; rows
        that are padded on the left are a mask and positions. plan: packed rows (attention.py); there is no cache then.
        """
        spec = self.spec
        q_nope, q_rope = self._queries(hidden_states).split([spec.nope_dim, spec.rope_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_states).split([spec.kv_rank, spec.rope_dim], -1)
        latent, k_rope = self.kv_a_layernorm(latent)[:, None], k_rope[:, None]
        cos, sin = rotation(position_ids, spec.rope, spec.rope_dim)
        q_rope, k_rope = rotate(q_rope, cos, sin), rotate(k_rope, cos, sin)
        if past_key_values is not None:
            latent, k_rope = past_key_values.update(latent, k_rope, self.layer_idx)
        absorb = plan is None and not self.training and self._absorbing_is_less(q_nope.shape[2], latent.shape[2])
        if absorb:
            out = self.absorbed(q_nope, q_rope, latent, k_rope, attention_mask)
        else:
            out = self.expanded(q_nope, q_rope, latent, k_rope, attention_mask, plan)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    def expanded(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        mask: Tensor | None = None,
        plan: Any = None,
    ) -> Tensor:
        """q_nope [B, H, Q, d_n], q_rope [B, H, Q, d_r], latent [B, 1, S, r], k_rope [B, 1, S, d_r] -> [B, H, Q, d_v]."""
        spec = self.spec
        keys_values = self.kv_b_proj(latent[:, 0]).unflatten(-1, (spec.num_heads, -1)).transpose(1, 2)
        k_nope, values = keys_values.split([spec.nope_dim, spec.v_dim], -1)
        keys = torch.cat([k_nope, k_rope.expand(-1, spec.num_heads, -1, -1)], -1)
        queries = torch.cat([q_nope, q_rope], -1)
        dropout = spec.dropout if self.training else 0.0
        out = self._attend(queries, keys, values, mask, plan, dropout)
        return out.transpose(1, 2)

    def absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The same function of the same arguments, without a key or a value per head: (q W_uk) c instead of q (W_uk c).
        All heads read the same latents, so that they are rows of one product."""
        spec = self.spec
        rows, heads, new, _ = q_nope.shape
        up = self.kv_b_proj.weight.unflatten(0, (heads, -1))  # [H, d_n + d_v, r]
        up_key, up_value = up.split([spec.nope_dim, spec.v_dim], 1)
        q_latent = (q_nope @ up_key).flatten(1, 2)  # [B, H Q, r]
        latent, k_rope = latent[:, 0], k_rope[:, 0]
        scores = q_latent @ latent.mT + q_rope.flatten(1, 2) @ k_rope.mT  # [B, H Q, S]
        scores = (scores * spec.scale).unflatten(1, (heads, new))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = masked(scores, mask).softmax(-1).to(latent.dtype)
        out = (weights.flatten(1, 2) @ latent).unflatten(1, (heads, new))
        return out @ up_value.mT

    def _queries(self, hidden: Tensor) -> Tensor:
        """[B, Q, d] -> [B, H, Q, d_n + d_r]"""
        if self.spec.q_rank is None:
            flat = self.q_proj(hidden)
        else:
            flat = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        return flat.unflatten(-1, (self.spec.num_heads, -1)).transpose(1, 2)

    def _absorbing_is_less(self, new: int, total: int) -> bool:
        """Multiplications per head and token of the cache: scores and values over the latent, against expanding the
        latent and scores and values over heads. Decoding absorbs, prompts expand, chunks do what is less."""
        spec = self.spec
        expanded = new * (spec.nope_dim + spec.rope_dim + spec.v_dim) + spec.kv_rank * (spec.nope_dim + spec.v_dim)
        absorbed = new * (2 * spec.kv_rank + spec.rope_dim)
        return new < total and absorbed < expanded

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, plan: Any, dropout: float) -> Tensor:
        """-> [B, Q, H, d_v]"""
        backend = "sdpa" if self.config is None else self.config._attn_implementation
        call = attention
        if plan is None and backend not in (NAME, "sdpa"):
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            call = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager)
        more = {} if plan is None else {"plan": plan}
        return call(self, q, k, v, mask, scaling=self.spec.scale, dropout=dropout, **more)[0]


class Latent(LatentAttention):
    """The mixer of a layer of modeling_adapted.py. `config.mixer_options["latent"]` is a LatentSpec without the sizes that
    the config states anyway; its ranks are one number, or one for each layer of the model (null elsewhere)."""

    def __init__(self, config: Any, layer_idx: int):
        options = dict(config.mixer_options["latent"])
        for key in ("kv_rank", "q_rank"):
            if isinstance(ranks := options.get(key), list | tuple):
                options[key] = ranks[layer_idx]
        spec = LatentSpec(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            dropout=config.attention_dropout,
            **options,
        )
        super().__init__(spec, layer_idx, config)


def eager(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, dropout: float):
    """The textbook's, for those who want to look inside."""
    weights = masked((q @ k.mT).float() * scaling, mask).softmax(-1).to(q.dtype)
    out = nn.functional.dropout(weights, dropout, module.training) @ v
    return out.transpose(1, 2), weights


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """scores [B, H, Q, S]. Without a mask the last Q of S tokens see what is before them. A query that sees nothing
    (padding) gets even weights instead of NaN."""
    new, total = scores.shape[-2:]
    if mask is None and new == 1:
        return scores
    if mask is None:
        place = torch.arange(total, device=scores.device)
        mask = place[None, :] <= place[total - new :, None]
    if mask.dtype != torch.bool:
        return scores + mask
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)


def rotation(position_ids: Tensor, rope: dict[str, Any], dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, Q, d_r / 2] fp32, times YaRN's amplitude. Computed where they are used: no buffer has to survive
    a meta device."""
    angles = position_ids[:, None, :, None].float() * frequencies(rope, dim, position_ids.device)
    size = amplitude(rope)
    return angles.cos() * size, angles.sin() * size


def frequencies(rope: dict[str, Any], dim: int, device: torch.device | str = "cpu") -> Tensor:
    """[d_r / 2] radians per position. `llama3` slows down those whose wavelength is beyond the original context, and
    blends between (Llama 3.1; transformers' `_compute_llama3_parameters`). `yarn` keeps those that turn more than
    `beta_fast` times in it, slows down those below `beta_slow`, and blends by their number in between (2309.00071)."""
    kind = rope.get("rope_type", "default")
    own = 1 / rope["rope_theta"] ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    if kind == "default":
        return own
    if kind == "linear":
        return own / rope["factor"]
    if kind == "yarn":
        kept = _yarn_kept(rope, dim, device)
        return own / rope["factor"] * (1 - kept) + own * kept
    if kind != "llama3":
        raise ValueError(f"latent attention has no {kind} RoPE; there are default, linear, llama3 and yarn")
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    turns = context * own / (2 * math.pi)  # within the original context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return own * (blend + (1 - blend) / rope["factor"])


def _yarn_kept(rope: dict[str, Any], dim: int, device: torch.device | str) -> Tensor:
    """[d_r / 2], 1 for frequencies that stay; a straight line between whole numbers of pairs, as DeepSeek cuts it."""
    context, log = rope["original_max_position_embeddings"], math.log(rope["rope_theta"])
    fast, slow = (
        dim * math.log(context / (turns * 2 * math.pi)) / (2 * log)
        for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    )
    first, last = max(math.floor(fast), 0), min(math.ceil(slow), dim - 1)
    place = torch.arange(dim // 2, device=device, dtype=torch.float32)
    return 1 - ((place - first) / (last - first or 0.001)).clamp(0, 1)


def amplitude(rope: dict[str, Any]) -> float:
    """By which YaRN multiplies cos and sin, on both sides of the product; 1 for all others."""
    if rope.get("rope_type") != "yarn":
        return 1.0
    one, everywhere = rope.get("mscale"), rope.get("mscale_all_dim")
    if one and everywhere:
        return yarn_scale(rope["factor"], one) / yarn_scale(rope["factor"], everywhere)
    return yarn_scale(rope["factor"])


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """0.1 ln(factor) + 1 (YaRN, equation 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, Q, d_r], pairs (0, 1), (2, 3), ... The result has first parts first, as both sides of a product may."""
    first, second = x[..., 0::2], x[..., 1::2]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
