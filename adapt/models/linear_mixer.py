"""A layer whose attention a recurrence replaces: the teacher's projections around it, and the teacher's softmax heads
for as long as they are learned from.

Legend: B rows, S tokens, D hidden size, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .blocks import blocks
from .state_cache import StateLayer
from .tokens import Tokens


PIECE = 4096
"""Tokens that a prefill computes at a time: what stands between the projections stays small however long a prompt is."""


def in_pieces(recurrence: nn.Module, x, q, k, v, rotary, tokens: Tokens, states: Any) -> tuple[Tensor, Any]:
    """`recurrence(...)`, without gradients piece by piece from state to state: the same function. Packed rows are
    whole: their documents end within them."""
    if torch.is_grad_enabled() or x.shape[1] <= PIECE or tokens.segments is not None:
        return recurrence(x, q, k, v, rotary, tokens, states)
    parts, (cos_sin, rotate) = [], rotary
    for start in range(0, x.shape[1], PIECE):
        at = slice(start, start + PIECE)
        angles = tuple(t[:, at] for t in cos_sin)
        part = Tokens(keep=None if tokens.keep is None else tokens.keep[:, at])
        heads, states = recurrence(*(t[:, at] for t in (x, q, k, v)), (angles, rotate), part, states)
        parts.append(heads)
    return torch.cat(parts, 1), states


class LinearMixer(nn.Module):
    """`recurrence`: a module called as `(x, q, k, v, rotary, tokens, states) -> (heads, states)` with x [B, S, D],
    q [B, S, H, d], k and v [B, S, G, d], heads [B, S, H, d]. Its states are {name: [B, ...]} of a size that does not
    depend on S; None stands for the states before the first token. `log_decays(x)` are its [B, H, S, *] decays, and
    `forget_nothing()` changes its weights so that all of them are 0. All that a conversion creates lies in it."""

    cache_layer = StateLayer
    created = "recurrence"
    learns = True
    is_causal = True
    """transformers' attention functions read this, and `scaling`, `num_key_value_groups` and `layer_idx`."""

    def __init__(self, config: Any, layer_idx: int, recurrence: nn.Module):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.family = blocks(config.base_model_type)
        teacher = self.family.Attention(config, layer_idx)
        self.head_dim, self.scaling = config.head_dim, teacher.scaling
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            teacher.q_proj,
            teacher.k_proj,
            teacher.v_proj,
            teacher.o_proj,
        )
        self.q_norm, self.k_norm = getattr(teacher, "q_norm", None), getattr(teacher, "k_norm", None)
        self.recurrence = recurrence

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        tokens: Tokens | None = None,
        transfer: Tensor | None = None,
        plan: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, S, D] -> the same, and with `transfer` [3]: the two of `_errors`, and the sum over tokens
        of the mean log2 half-life, in tokens (None without)."""
        q, k, v = self.project(hidden_states)
        rotary = (position_embeddings, self.family.apply_rotary)
        tokens = tokens or Tokens()
        if transfer is not None:
            return self._taught(hidden_states, q, k, v, rotary, tokens, transfer, attention_mask, plan)
        layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        heads, states = in_pieces(self.recurrence, hidden_states, q, k, v, rotary, tokens, layer and layer.states)
        if layer is not None:
            layer.advance(states, hidden_states.shape[1])
        return self.o_proj(heads.flatten(2).to(hidden_states.dtype)), None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _taught(self, x, q, k, v, rotary, tokens, transfer, attention_mask, plan) -> tuple[Tensor, Tensor]:
        """The layer's output is the teacher's, so the next layer sees what it would see in the teacher, and every
        layer learns by itself: nothing flows into the projections or into the layers before."""
        with torch.no_grad():
            taught = self.softmax_heads(q, k, v, rotary, attention_mask, plan)
            out = self.o_proj(taught)
        with torch.enable_grad():
            found, _ = self.recurrence(x.detach(), q.detach(), k.detach(), v.detach(), rotary, tokens, None)
            errors = _errors(found.flatten(2), taught, transfer)
            half_life = (-math.log(2) / self.recurrence.log_decays(x).detach().clamp(max=-1e-9)).log2().mean((1, 3))
            return out, torch.cat([errors, (half_life * transfer).sum()[None]])

    def softmax_heads(self, q, k, v, rotary, attention_mask, plan) -> Tensor:
        """[B, S, H d] the heads' outputs of the attention this layer had, as its family computes them."""
        (cos, sin), apply_rotary = rotary
        q, k = apply_rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.family.eager_attention)
        more = {} if plan is None else {"plan": plan}
        dropout = self.config.attention_dropout if self.training else 0.0
        out, _ = attend(self, q, k, v.transpose(1, 2), attention_mask, dropout=dropout, scaling=self.scaling, **more)
        return out.flatten(2).contiguous()


def _errors(found: Tensor, taught: Tensor, weight: Tensor) -> Tensor:
    """found, taught [B, S, H d], weight [B, S] -> [2]: sums over tokens of the mean squared error, and of
    |found - taught|^2 / |taught|^2 (for reading, without gradient); in float32 or wider."""
    dtype = torch.promote_types(found.dtype, torch.float32)
    square = (found.to(dtype) - taught.to(dtype)).square()
    mean = (square.mean(-1) * weight).sum()
    relative = square.detach().sum(-1) / taught.to(dtype).square().sum(-1).clamp_min(1e-12)
    return torch.stack([mean, (relative * weight).sum()])
