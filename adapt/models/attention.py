"""The attention a layout asks for, with nothing wasted: FlexAttention on GPUs, tiles of SDPA elsewhere.

Registered with transformers as `adapt`, so stock Llama, Mistral and Qwen models use it unpatched: the plan travels as
the forward keyword argument `plan`. Without a plan (decoding, plain forward) it behaves as `sdpa`.

Legend: B rows, H query heads, G key/value heads, S tokens of a row, D head size.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import Layout
from .window import attend, windows_of

log = logging.getLogger("adapt.attention")

NAME = "adapt"
TILE = 128
"""Queries per SDPA call on the tiled path: the measured optimum on CPUs between 64 (overhead) and 256 (waste)."""
SPAN = 32
"""Granularity at which keys without any visible entry are left out of a tile."""


@dataclass(frozen=True)
class Tile:
    start: int
    stop: int
    spans: tuple[tuple[int, int], ...]
    """Key ranges that at least one query of the tile sees."""
    mask: Tensor | None
    """[queries, keys of the spans] bool, or None where everything is visible."""


@dataclass(frozen=True)
class TilePlan:
    rows: tuple[tuple[Tile, ...], ...]


def make_plan(layout: Layout, backend: str = "auto") -> Any:
    """A FlexAttention BlockMask or a TilePlan; built once per batch, shared by all layers and by recomputation."""
    device = layout.doc.device
    if backend == "auto":
        backend = "flex" if device.type == "cuda" else "tiled"
    _say(backend, device.type)
    return _flex_plan(layout) if backend == "flex" else _tile_plan(layout)


@cache
def _say(backend: str, device: str) -> None:
    log.info("attention: %s on %s", {"flex": "FlexAttention", "tiled": "tiled SDPA"}[backend], device)


def _flex_plan(layout: Layout):
    rows, length = layout.doc.shape

    def visible(b, h, q, k):
        return layout.visible(b, q, k)

    return _compiled_block_mask()(visible, rows, None, length, length, device=layout.doc.device)


@cache
def _compiled_block_mask():
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask)


@cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _tile_plan(layout: Layout) -> TilePlan:
    rows, length = layout.doc.shape
    keys = torch.arange(length, device=layout.doc.device)
    plan = []
    for row in range(rows):
        b = torch.tensor(row, device=layout.doc.device)
        tiles = []
        for start in range(0, length, TILE):
            stop = min(start + TILE, length)
            mask = layout.visible(b, keys[start:stop, None], keys[None, :])
            spans = _spans(mask)
            mask = torch.cat([mask[:, i:j] for i, j in spans], 1)
            tiles.append(Tile(start, stop, spans, None if bool(mask.all()) else mask))
        plan.append(tuple(tiles))
    return TilePlan(tuple(plan))


def _spans(mask: Tensor) -> tuple[tuple[int, int], ...]:
    """Maximal runs of key chunks of SPAN in which some query sees some key."""
    length = mask.shape[1]
    used = F.pad(mask.any(0), (0, -length % SPAN)).view(-1, SPAN).any(1).tolist()
    spans, start = [], None
    for i, use in enumerate([*used, False]):
        if use and start is None:
            start = i
        elif not use and start is not None:
            spans.append((start * SPAN, min(i * SPAN, length)))
            start = None
    return tuple(spans)


def _tiled(q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, scale: float | None, dropout: float) -> Tensor:
    """q [B, H, S, D], k and v [B, G, S, D] -> [B, H, S, D]."""
    rows = []
    for row, tiles in enumerate(plan.rows):
        out = [
            F.scaled_dot_product_attention(
                q[row : row + 1, :, tile.start : tile.stop],
                _take(k[row : row + 1], tile.spans),
                _take(v[row : row + 1], tile.spans),
                attn_mask=None if tile.mask is None else tile.mask[None, None],
                dropout_p=dropout,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            for tile in tiles
        ]
        rows.append(torch.cat(out, 2))
    return torch.cat(rows, 0)


_run_tiles = _tiled


def keep_out_of_graphs() -> None:
    """For compiled models: tiles are Python loops over a plan that changes with every batch, so the compiler calls them
    as they are. (Not a decorator: it would cost every import the second that importing the compiler takes.)"""
    global _run_tiles
    _run_tiles = torch.compiler.disable(_tiled)


def _take(x: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
    parts = [x[:, :, start:stop] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    plan: Any = None,
    window_plans: dict[int, Any] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, S, D], key and value [B, G, S, D] -> ([B, S, H, D], None).
    `window_plans`: the plan of layers that have a window (window.py), by its size."""
    window = getattr(module, "window", None)
    if plan is None and window is not None:
        return attend(query, key, value, attention_mask, window, scaling, dropout).transpose(1, 2), None
    if window is not None:
        plan = window_plans[window]
    if plan is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if isinstance(plan, TilePlan):
        out = _run_tiles(query, key, value, plan, scaling, dropout)
    else:
        if dropout:
            raise ValueError(
                f"FlexAttention has no dropout, and the model asks for attention_dropout={dropout}"
            )
        out = _compiled_flex()(query, key, value, block_mask=plan, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def register() -> None:
    """Make `attn_implementation="adapt"` known to transformers. Its masks are sdpa's: used when there is no plan."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def use(model: nn.Module) -> nn.Module:
    """Switch a transformers model to this attention."""
    register()
    model.set_attn_implementation(NAME)
    return model


def hidden_states(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor, layout: Layout, backend: str = "auto"
) -> Tensor:
    """Final hidden states [B, S, hidden] of a causal LM on rows laid out by `layout`; no logits are formed."""
    return decode(model, input_ids, position_ids, layout, backend).last_hidden_state


def decode(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor, layout: Layout, backend: str = "auto", **more: Any
) -> Any:
    """What the decoder returns on rows laid out by `layout`; `more` goes to its forward.

    The 4-D placeholder makes transformers leave masks alone (it returns 4-D masks as they are); the plan does the work.
    """
    decoder = model.get_decoder()
    if getattr(decoder, "reads_layout", False):
        more["layout"] = layout
    if windows := windows_of(decoder):
        more["window_plans"] = {size: make_plan(replace(layout, window=size), backend) for size in windows}
    return decoder(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=input_ids.new_zeros(input_ids.shape[0], 1, 1, 1, dtype=torch.bool),
        plan=make_plan(layout, backend),
        use_cache=False,
        **more,
    )


def head_weight(model: nn.Module) -> Tensor:
    """The LM head's matrix [vocabulary, hidden] (the embedding itself where they are tied)."""
    return model.get_output_embeddings().weight
