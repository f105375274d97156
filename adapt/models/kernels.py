"""The one place that chooses how an operation runs: a CUDA package where it is there and fit, else plain torch.

Packages: flash-linear-attention (`fla`), causal-conv1d, mamba-ssm. Each choice is logged once. A package counts as
there when it is found, imports, and a CUDA device is what the tensors are on; float64 is always ours.

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
    segments: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = 64,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """o [B, H, T, V] and the last state [B, H, K, V] of linear_attention.py's recurrence, whose arguments these are."""
    length = q.shape[2]
    if segments is None and length > SHORT and (ops := _fit(q, "fla.ops.gla")) is not None:
        _say("gated linear attention", "flash-linear-attention", q.device.type)
        return _fla(ops.chunk_gla, q, k, v, g, state)
    _say("gated linear attention", "torch", q.device.type)
    if length == 1 or (length <= SHORT and not torch.is_grad_enabled()):
        return recurrent(q, k, v, g, segments=segments, state=state)
    return chunked(q, k, v, g, segments=segments, state=state, chunk=chunk, exact=exact)


def _fla(chunk_gla: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """fla's layout is [B, T, H, *]; its scale is 1/sqrt(K) unless told. It wants a decay for each channel."""
    q, k, v, g = (x.transpose(1, 2).contiguous() for x in (q, k, v, g.expand_as(q)))
    out, state = chunk_gla(q, k, v, g, scale=1.0, initial_state=state, output_final_state=True)
    return out.transpose(1, 2), state


def causal_conv(whole: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor | None, *, silu: bool) -> Tensor:
    """whole [B, W - 1 + T, C], weight [C, 1, W], segments [B, T] -> [B, T, C]; the first W - 1 are what came before."""
    weight, bias = weight[:, 0].to(whole.dtype), None if bias is None else bias.to(whole.dtype)
    before = weight.shape[1] - 1
    if segments is None and (conv := _fit(whole, "causal_conv1d")) is not None:
        _say("short convolution", "causal-conv1d", whole.device.type)
        y = conv.causal_conv1d_fn(whole.transpose(1, 2), weight, bias, activation="silu" if silu else None)
        return y.transpose(1, 2)[:, before:]
    _say("short convolution", "torch", whole.device.type)
    length = whole.shape[1] - before
    if segments is not None:  # what came before belongs to the row's first document
        segments = torch.cat([segments[:, :1].expand(-1, before), segments], 1)
    y = None
    for tap in range(weight.shape[1]):
        x = whole[:, tap : tap + length]
        if segments is not None and tap < before:
            x = x * (segments[:, tap : tap + length] == segments[:, before:])[..., None]
        y = x * weight[:, tap] if y is None else y + x * weight[:, tap]
    y = y if bias is None else y + bias
    return F.silu(y) if silu else y
