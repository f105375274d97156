"""LAWCAT's layer: normalised gated linear attention over short convolutions (Liu et al. 2025, arXiv 2509.18467).

    q', k' = conv(q), conv(k)                       no position encoding, no convolution on v
    phi(u) = max([softmax(u M), softmax(-u M)], 1e-12)      one M for each head (Hedgehog, LoLCATs)
    g = logsigmoid(gate(x)) / 16
    o_t = phi(q'_t)' S_t / (phi(q'_t)' z_t + 1e-10)         S, z: sums of phi(k') v' and phi(k') that decay with g

so that o_t is a convex combination of the values so far. The sum z is one more column of S: the values get a one.

Legend: B rows, S tokens, D hidden size, H query heads, G key/value heads, d head size, F features, R rank of the gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import gated_linear_attention
from .linear_attention import floor
from .linear_mixer import LinearMixer
from .short_convolution import ShortConvolution
from .tokens import Tokens

EPS = 1e-10


@dataclass(frozen=True, kw_only=True)
class GatedLinearOptions:
    """What `config.mixer_options["gated_linear"]` may say."""

    gate: str = "channel"
    """`channel`: one decay for each key channel; `head`: one for each head."""
    gate_rank: int | None = 16
    """None: full rank."""
    gate_bias: float = 0.0
    """Where the gate's bias starts: 0 forgets half in 16 tokens, 6 in 4,480."""
    features: int | None = None
    """F; None: d / 2."""
    tied: bool = True
    """One feature map for queries and keys."""
    conv_width: int = 4
    conv_silu: bool = False
    rope: str = "none"
    """`before_conv`: rotate queries and keys, as the teacher does."""
    chunk: int = 64
    exact: bool = False
    """False: decays of a channel gate are limited to what the fast form can compute (exp(-80 / chunk) a token)."""


class DecayGate(nn.Module):
    """x [B, S, D] -> log decays [B, S, out], at most 0, in float32 or wider."""

    def __init__(self, inputs: int, outputs: int, rank: int | None, start: float = 0.0):
        super().__init__()
        self.start = start
        self.down = None if rank is None else nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.empty(outputs, rank or inputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    @torch.no_grad()
    def initialise(self) -> None:
        """Decays that hardly depend on the token."""
        for weight in (self.down, self.up):
            if weight is not None:
                weight.normal_(0, 0.006)
        self.bias.fill_(self.start)

    @torch.no_grad()
    def open(self) -> None:
        """Change the weights so that every decay is 1 (log decay 0)."""
        self.up.zero_()
        self.bias.fill_(1e4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.down is not None:
            x = F.linear(x, self.down.to(x.dtype))
        return F.logsigmoid(F.linear(x, self.up.to(x.dtype), self.bias.to(x.dtype))) / 16


class FeatureMap(nn.Module):
    """u [B, S, H, d] -> [B, H, S, 2F], positive."""

    def __init__(self, heads: int, head_dim: int, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, head_dim, features))

    @torch.no_grad()
    def initialise(self) -> None:
        """Features are channels: the first F of them."""
        self.weight.copy_(torch.eye(*self.weight.shape[1:], device=self.weight.device))

    def forward(self, u: Tensor) -> Tensor:
        u = u.transpose(1, 2) @ self.weight.to(u.dtype)
        return torch.cat([u.softmax(-1), (-u).softmax(-1)], -1).clamp_min(1e-12)


class GatedLinearRecurrence(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.options = o = GatedLinearOptions(**config.mixer_options.get("gated_linear", {}))
        heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        features = d // 2 if o.features is None else o.features
        if o.gate == "channel" and 2 * features != d:
            raise ValueError(
                f"a channel gate has one decay for each of the {d} channels of a key head, and {features} features make "
                f"{2 * features} keys: take {d // 2} features, or gate: head"
            )
        self.groups, self.repeats = groups, heads // groups
        self.q_conv = ShortConvolution(heads * d, o.conv_width, others=1e-3, silu=o.conv_silu)
        self.k_conv = ShortConvolution(heads * d, o.conv_width, others=1e-3, silu=o.conv_silu)
        self.q_map = FeatureMap(heads, d, features)
        self.k_map = None if o.tied else FeatureMap(heads, d, features)
        decays = groups * (d if o.gate == "channel" else 1)
        self.gate = DecayGate(config.hidden_size, decays, o.gate_rank, o.gate_bias)

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple,
        tokens: Tokens,
        states: dict[str, Tensor] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        o, d, states = self.options, q.shape[-1], states or {}
        if o.rope == "before_conv":
            (cos, sin), rotate = rotary
            q, k = rotate(q, k, cos, sin, unsqueeze_dim=2)
        q, q_tail = self.q_conv(q.flatten(2), tokens, states.get("q_tail"))
        k_tail = states.get("k_tail")
        k, k_tail = self.k_conv(self._repeat(k, 2), tokens, None if k_tail is None else self._repeat(k_tail, 2))
        k_tail = k_tail.unflatten(2, (self.groups, self.repeats, d))[:, :, :, 0]
        q, k = self.q_map(q.unflatten(2, (-1, d))), (self.k_map or self.q_map)(k.unflatten(2, (-1, d)))
        g = self.log_decays(x)
        v = v.to(q.dtype).repeat_interleave(self.repeats, 2).transpose(1, 2)
        if tokens.keep is not None:
            keep = tokens.keep[:, None, :, None]
            k, g = k * keep, g * keep
        out, state = gated_linear_attention(
            q, k, F.pad(v, (0, 1), value=1.0), g,
            tokens=tokens, state=states.get("state"), chunk=o.chunk, exact=o.exact,
        )  # fmt: skip
        heads = out[..., :-1] / (out[..., -1:] + EPS)
        return heads.transpose(1, 2), {"state": state, "q_tail": q_tail, "k_tail": k_tail}

    def log_decays(self, x: Tensor) -> Tensor:
        """x [B, S, D] -> [B, H, S, d] or [B, H, S, 1]."""
        g = self.gate(x).unflatten(2, (self.groups, -1)).repeat_interleave(self.repeats, 2).transpose(1, 2)
        limited = self.options.gate == "channel" and not self.options.exact
        return g.clamp_min(floor(self.options.chunk)) if limited else g

    def forget_nothing(self) -> None:
        self.gate.open()

    def _repeat(self, x: Tensor, dim: int) -> Tensor:
        """[B, *, G, d] -> [B, *, H d]."""
        return x.repeat_interleave(self.repeats, dim).flatten(dim)


class GatedLinear(LinearMixer):
    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx, GatedLinearRecurrence(config))
