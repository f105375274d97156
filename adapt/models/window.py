"""Softmax attention to the last tokens only: a model of this attention (attention.py) as a sliding-window model.

A layer's window is its module's attribute `window`, so layers may differ, and no weight changes.

Legend: B rows, H query heads, G key/value heads, Q queries, S keys, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 128
"""Queries per SDPA call."""


@contextmanager
def windowed(model: nn.Module, windows: Mapping[int, int]) -> Iterator[None]:
    """While this lasts, layer i of a causal LM sees the last `windows[i]` tokens, the query's own included; layers that
    are not named see all. Raises ValueError for a window without any token."""
    if wrong := [w for w in windows.values() if w < 1]:
        raise ValueError(f"a window of {wrong[0]} tokens has none to look at")
    modules = [(model.get_decoder().layers[i].self_attn, w) for i, w in windows.items()]
    for module, window in modules:
        module.window = window
    try:
        yield
    finally:
        for module, _ in modules:
            del module.window


def windows_of(decoder: nn.Module) -> set[int]:
    """The windows that layers have at the moment."""
    found = (getattr(getattr(layer, "self_attn", None), "window", None) for layer in getattr(decoder, "layers", ()))
    return {window for window in found if window is not None}


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int, scaling: float | None, dropout: float
) -> Tensor:
    """query [B, H, Q, D] of the last Q of the S tokens of key and value [B, G, S, D] -> [B, H, Q, D]. mask [B, 1, Q, S]
    bool says what may be seen besides (None: what came before). Tile by tile: time Q (window + TILE), and no mask of all
    queries by all keys. Padding must be on the left: the window counts columns."""
    queries, keys = query.shape[2], key.shape[2]
    parts = []
    for start in range(0, queries, TILE):
        stop = min(start + TILE, queries)
        first, end = keys - queries + start, keys - queries + stop
        low = max(0, first - window + 1)
        at = torch.arange(first, end, device=query.device)[:, None]
        before = at - torch.arange(low, end, device=query.device)[None]
        seen = (before >= 0) & (before < window)
        parts.append(
            F.scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, low:end],
                value[:, :, low:end],
                attn_mask=seen if mask is None else seen & mask[:, :, start:stop, low:end],
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(parts, 2)
