"""Layers of a decoder, called one by one: how objectives read what a layer is given and what it makes of it.

Legend: B rows, S tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adapt.models.layout import Layout
from adapt.models.tokens import Tokens


class Layers:
    """The decoder layers of a causal LM on rows laid out by `layout`. `plan` is attention.make_plan's of it, which several
    models may share."""

    def __init__(self, model: nn.Module, position_ids: Tensor, layout: Layout, plan: Any):
        self.decoder = model.get_decoder()
        self.position_ids, self.plan = position_ids, plan
        self.more = {"tokens": Tokens.of(layout)} if getattr(self.decoder, "reads_layout", False) else {}
        self.positions: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.decoder.layers)

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, S] -> [B, S, D], what the first layer reads."""
        return self.decoder.embed_tokens(input_ids)

    def __call__(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [B, S, D] before the layer -> (behind it, what its token mixer adds), both [B, S, D]."""
        hidden = hidden.to(self.decoder.embed_tokens.weight.dtype)
        if self.positions is None:
            self.positions = self.decoder.rotary_emb(hidden, position_ids=self.position_ids)
        layer, kept = self.decoder.layers[index], []
        hooks = (
            layer.self_attn.register_forward_hook(lambda module, args, output: kept.append(output[0])),
            # ahead of FSDP2's own hook, which has to see all that a gradient may come back through
            layer.register_forward_hook(lambda module, args, output: (output, kept.pop()), prepend=True),
        )
        try:
            return layer(
                hidden,
                attention_mask=None,
                position_ids=self.position_ids,
                past_key_values=None,
                use_cache=False,
                position_embeddings=self.positions,
                plan=self.plan,
                **self.more,
            )
        finally:
            for hook in hooks:
                hook.remove()


def starting_at(hidden: Tensor, *, sharded: bool) -> Tensor:
    """`hidden` as the input of a layer that learns by itself: nothing flows out of it. Where the layer is sharded, the
    input has a gradient, thrown away at once: FSDP2 takes it for the end of the layer's backward, and frees its weights
    there instead of at the end of all."""
    start = hidden.detach().requires_grad_(sharded)
    if sharded and torch.is_grad_enabled():
        start.register_post_accumulate_grad_hook(lambda x: setattr(x, "grad", None))
    return start
