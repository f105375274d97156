"""Stock DeepseekV3 models decode as ours do. transformers maps every cached latent to keys and values of all heads at every
step; here the maps move to the queries and the outputs (models/latent_attention.py). The function, its parameters and
its cache are the same."""

from __future__ import annotations

from typing import Any

ROPES = ("default", "linear", "llama3", "yarn")
"""Those that latent attention computes."""
BACKENDS = ("sdpa", "eager")
"""Those whose masks it reads."""


def absorb(model: Any) -> Any:
    """`model`, whose latent layers now absorb where that is less work; in place. A model of another class, RoPE or
    attention backend stays as it is: it computes the same, as transformers does."""
    config = model.config
    if config.model_type != "deepseek_v3" or config._attn_implementation not in BACKENDS:
        return model
    if not config.rope_interleave or config.rope_parameters.get("rope_type", "default") not in ROPES:
        return model
    for layer in model.model.layers:
        layer.self_attn = _ours(layer.self_attn, config)
    return model


def _ours(stock: Any, config: Any) -> Any:
    """A layer made of the modules of `stock`: hence biases, and the norms' own precision."""
    import torch

    from adapt.models.latent_attention import LatentAttention, LatentSpec

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
        mixer = LatentAttention(spec, stock.layer_idx, config)
    for name, module in stock.named_children():
        setattr(mixer, name, module)
    return mixer.train(stock.training)
