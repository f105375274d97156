"""Stock DeepseekV3 models decode as ours do. transformers maps every cached latent to keys and values of all heads at every
step; here the maps move to the queries and the outputs (models/latent_attention.py). The function, its parameters and
its cache are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapt.models.latent_attention import LatentAttention, LatentSpec

BACKENDS = ("sdpa", "eager")
"""Those whose masks the absorbed form reads."""


def absorb(model: Any) -> Any:
    """`model`, whose latent layers now absorb where that is less work; in place. Other classes, and DeepseekV3 with a
    kernel that takes no mask of queries by keys, stay as they are."""
    if model.config.model_type == "deepseek_v3" and model.config._attn_implementation in BACKENDS:
        for layer in model.model.layers:
            layer.self_attn = StockLatent.of(layer.self_attn)
    return model


class StockLatent(LatentAttention):
    """Made of the modules of transformers' layer, hence its biases and norms, with its positions and scale."""

    @classmethod
    def of(cls, stock: Any) -> StockLatent:
        config = stock.config
        spec = LatentSpec(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            kv_rank=config.kv_lora_rank,
            q_rank=config.q_lora_rank,
            nope_dim=config.qk_nope_head_dim,
            rope_dim=config.qk_rope_head_dim,
            v_dim=config.v_head_dim,
            rope=dict(config.rope_parameters),
            dropout=config.attention_dropout,
        )
        with torch.device("meta"):
            made = cls(spec, stock.layer_idx, config)
        for name, module in stock.named_children():
            setattr(made, name, module)
        made.scale = stock.scaling
        return made.train(stock.training)

    def turned(self, q_rope: Tensor, k_rope: Tensor, position_ids: Tensor, position_embeddings: Any, **_: Any):
        """By the angles that the model computes once for all of its layers, whatever its RoPE."""
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

        turn = theirs.apply_rotary_pos_emb_interleave if self.config.rope_interleave else theirs.apply_rotary_pos_emb
        return turn(q_rope, k_rope, *position_embeddings)
