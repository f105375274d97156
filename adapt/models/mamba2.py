"""Mamba-2 (SSD) in the place of attention (Dao and Gu 2024; Wang et al. 2024, "The Mamba in the Llama").

    C, B, x = conv(q), conv(k), conv(v)         C <- Wq, B <- Wk, x <- Wv, out <- Wo; B and x repeated over the groups
    dt = softplus(x Wdt + dt_bias),  a = -exp(A_log)
    S_t = exp(a dt_t) S_{t-1} + B_t (dt_t x_t)',    y_t = S_t' C_t + D x_t
    heads = norm(y silu(z)),  z = x Wz + b

No position encoding, no normaliser.

Legend: B rows, S tokens, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import state_space
from .linear_mixer import LinearMixer
from .short_convolution import ShortConvolution
from .tokens import Tokens

PASS = 1.278464542761
"""silu(PASS) = 1: a gate that lets everything through."""
HALF_LIFE = 1000.0
"""Tokens after which the identity start has forgotten half."""


@dataclass(frozen=True, kw_only=True)
class Mamba2Options:
    """What `config.mixer_options["mamba2"]` may say."""

    init: str = "identity"
    """Where new parameters start. `identity`: everything passes, decays of about a thousand tokens (after MOHAWK's
    Llama); `mamba_in_llama`: random convolutions, gates and steps, as published."""
    norm: bool = True
    """RMSNorm of each head after the gate; raw sums of q k are unbounded without it."""
    conv_silu: bool = False
    conv_width: int = 4
    chunk: int = 64


class Mamba2Recurrence(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.options = o = Mamba2Options(**config.mixer_options.get("mamba2", {}))
        heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.heads, self.groups, self.repeats = heads, groups, heads // groups
        others = 0.0 if o.init == "identity" else None
        self.conv = ShortConvolution(
            (heads + 2 * groups) * d, o.conv_width, others=others, bias=True, silu=o.conv_silu
        )
        self.z_weight = nn.Parameter(torch.empty(heads * d, config.hidden_size))
        self.z_bias = nn.Parameter(torch.empty(heads * d))
        self.dt_weight = nn.Parameter(torch.empty(heads, config.hidden_size))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = nn.Parameter(torch.empty(heads, d)) if o.norm else None

    @torch.no_grad()
    def initialise(self) -> None:
        if self.norm is not None:
            self.norm.fill_(1.0)
        if self.options.init == "identity":
            for parameter in (self.z_weight, self.dt_weight, self.D):
                parameter.zero_()
            self.z_bias.fill_(PASS)
            self.dt_bias.fill_(math.log(math.e - 1))  # softplus of it is 1
            self.A_log.fill_(math.log(math.log(2) / HALF_LIFE))
            return
        for weight in (self.z_weight, self.dt_weight):
            weight.uniform_(-(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
        self.z_bias.zero_()
        step = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp_min(1e-4)
        self.dt_bias.copy_(step + (-(-step).expm1()).log())  # softplus of it is the step
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(1, 16).log())
        self.D.fill_(1.0)

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
        states, d = states or {}, q.shape[-1]
        mixed = torch.cat([v.flatten(2), k.flatten(2), q.flatten(2)], 2)
        mixed, tail = self.conv(mixed, tokens, states.get("tail"))
        values, B, C = mixed.split([self.groups * d, self.groups * d, self.heads * d], 2)
        C = C.unflatten(2, (-1, d)).transpose(1, 2)
        values, B = (
            t.unflatten(2, (-1, d)).repeat_interleave(self.repeats, 2).transpose(1, 2) for t in (values, B)
        )  # [B, H, S, d]
        x = x.to(C.dtype)
        dt = self.steps(x)
        if tokens.keep is not None:
            dt = dt * tokens.keep[:, None, :, None]
        A = self.rates(x.dtype)
        out, state = state_space(
            values, dt, A, B, C, tokens=tokens, state=states.get("state"), chunk=self.options.chunk
        )
        out = (out + self.D.to(x.dtype)[:, None, None] * values).transpose(1, 2)
        z = F.linear(x, self.z_weight.to(x.dtype), self.z_bias.to(x.dtype))
        out = out * F.silu(z).unflatten(2, (-1, d))
        if self.norm is not None:
            out = out * (out.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.norm.to(x.dtype)
        return out, {"state": state, "tail": tail}


    def steps(self, x: Tensor) -> Tensor:
        """x [B, S, D] -> [B, H, S, 1], above 0."""
        dt = F.softplus(F.linear(x, self.dt_weight.to(x.dtype), self.dt_bias.to(x.dtype)))
        return dt.transpose(1, 2)[..., None]

    def rates(self, dtype: torch.dtype) -> Tensor:
        """[H], below 0."""
        return -self.A_log.to(dtype).exp()

    @torch.no_grad()
    def forget_nothing(self) -> None:
        self.A_log.fill_(-1e4)

    def log_decays(self, x: Tensor) -> Tensor:
        """x [B, S, D] -> [B, H, S, 1]."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.rates(x.dtype)[:, None, None] * self.steps(x)


class Mamba2(LinearMixer):
    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx, Mamba2Recurrence(config))
