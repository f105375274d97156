"""The one place that chooses how an operation runs: a CUDA package where it is there and fit, else plain torch.

Packages: flash-linear-attention (`fla`), causal-conv1d, mamba-ssm. A package counts as there when it is found, imports,
and a CUDA device is what the tensors are on; float64 is always ours. Each choice is logged once.

Legend: B rows, H heads, T tokens, K key and V value channels, C channels, W taps.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear_attention import chunked, recurrent
from .tokens import Tokens

log = logging.getLogger("adapt.kernels")

SHORT = 16
"""Up to this many tokens the recurrence is as fast as a chunk."""


@cache
def package(name: str) -> Any:
    """The module, or None where it is missing or does not import (a build without CUDA, no triton)."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        return None
    try:
        return importlib.import_module(name)
    except Exception as error:  # these packages raise whatever their extension raises
        log.warning("%s is installed and does not import: %s", name, error)
        return None


@cache
def _say(operation: str, choice: str, device: str) -> None:
    log.info("%s: %s on %s", operation, choice, device)


def _fit(x: Tensor, name: str) -> Any:
    """The package for this tensor, or None."""
    return package(name) if x.is_cuda and x.dtype != torch.float64 else None


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    tokens: Tokens,
    state: Tensor | None = None,
    chunk: int = 64,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """o [B, H, T, V] and the last state [B, H, K, V] of linear_attention.py's recurrence, whose arguments these are."""
    if q.shape[2] > SHORT and _packed(tokens, state) and (ops := _fit(q, "fla.ops.gla")) is not None:
        _say("gated linear attention", "flash-linear-attention", q.device.type)
        return _fla(ops.chunk_gla, q, k, v, g, tokens.starts, state)
    _say("gated linear attention", "torch", q.device.type)
    return _torch(q, k, v, g, tokens.segments, state, chunk, exact)


def state_space(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, tokens: Tokens, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Mamba-2's S_t = exp(A dt_t) S_{t-1} + B_t (dt_t x_t)', y_t = S_t' C_t: x [B, H, T, V], dt [B, H, T, 1], A [H]
    below 0, B and C [B, H, T, K] -> y [B, H, T, V] and the last state [B, H, K, V]."""
    name = "mamba_ssm.ops.triton.ssd_combined"
    if x.shape[2] > SHORT and _packed(tokens, state) and (ops := _fit(x, name)) is not None:
        _say("state space", "mamba-ssm", x.device.type)
        return _mamba(ops.mamba_chunk_scan_combined, x, dt, A, B, C, tokens.segments, state, chunk)
    _say("state space", "torch", x.device.type)
    return _torch(C, B, dt * x, A[:, None, None] * dt, tokens.segments, state, chunk, exact=False)


def _packed(tokens: Tokens, state: Tensor | None) -> bool:
    """Whether kernels can take these rows: whole ones that may go on from a state, or packed ones that start afresh."""
    return tokens.segments is None or (tokens.starts is not None and state is None)


def _torch(q, k, v, g, segments, state, chunk, exact) -> tuple[Tensor, Tensor]:
    length = q.shape[2]
    if length == 1 or (length <= SHORT and not torch.is_grad_enabled()):
        return recurrent(q, k, v, g, segments=segments, state=state)
    return chunked(q, k, v, g, segments=segments, state=state, chunk=chunk, exact=exact)


def _fla(chunk_gla: Any, q, k, v, g, starts: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """fla's layout is [B, T, H, *], packed documents one after the other in a single row, each with a state of its own;
    it wants a decay for each channel, and scales by 1/sqrt(K) unless told."""
    rows, _, length, _ = q.shape
    q, k, v, g = (x.transpose(1, 2).contiguous() for x in (q, k, v, g.expand_as(q)))
    if starts is not None:
        q, k, v, g = (x.flatten(0, 1)[None] for x in (q, k, v, g))
    out, state = chunk_gla(
        q, k, v, g, scale=1.0, initial_state=state, output_final_state=True, cu_seqlens=starts
    )  # fmt: skip
    if starts is not None:
        out = out[0].unflatten(0, (rows, length))
        ends = torch.arange(1, rows + 1, device=starts.device, dtype=starts.dtype) * length
        state = state[torch.searchsorted(starts, ends) - 1]  # of each row's last document
    return out.transpose(1, 2), state


def _mamba(scan: Any, x, dt, A, B, C, segments, state: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """mamba-ssm's layout is [B, T, H, *], its state [B, H, V, K]; one group of B and C for each head."""
    x, B, C = (t.transpose(1, 2).contiguous() for t in (x, B, C))
    out, state = scan(
        x,
        dt[..., 0].transpose(1, 2).contiguous(),
        A,
        B,
        C,
        chunk_size=chunk,
        seq_idx=None if segments is None else segments.int(),
        initial_states=None if state is None else state.transpose(2, 3).contiguous(),
        return_final_states=True,
    )
    return out.transpose(1, 2), state.transpose(2, 3)


def causal_conv(whole: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor | None, *, silu: bool) -> Tensor:
    """whole [B, W - 1 + T, C], weight [C, 1, W], segments [B, T] -> [B, T, C]; the first W - 1 are what came before."""
    weight, bias = weight[:, 0].to(whole.dtype), None if bias is None else bias.to(whole.dtype)
    before = weight.shape[1] - 1
    if segments is not None:  # what came before belongs to the row's first document
        segments = torch.cat([segments[:, :1].expand(-1, before), segments], 1)
    if 1 <= before <= 3 and (conv := _fit(whole, "causal_conv1d")) is not None:
        _say("short convolution", "causal-conv1d", whole.device.type)
        runs = None if segments is None else segments.int()
        y = conv.causal_conv1d_fn(
            whole.transpose(1, 2), weight, bias, seq_idx=runs, activation="silu" if silu else None
        )
        return y.transpose(1, 2)[:, before:]
    _say("short convolution", "torch", whole.device.type)
    length, y = whole.shape[1] - before, None
    for tap in range(weight.shape[1]):
        x = whole[:, tap : tap + length]
        if segments is not None and tap < before:
            x = x * (segments[:, tap : tap + length] == segments[:, before:])[..., None]
        y = x * weight[:, tap] if y is None else y + x * weight[:, tap]
    y = y if bias is None else y + bias
    return F.silu(y) if silu else y
