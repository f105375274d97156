"""The decoder blocks of the families that can be adapted, as transformers has them."""

from __future__ import annotations

import importlib
from functools import cache
from types import SimpleNamespace

NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@cache
def blocks(family: str) -> SimpleNamespace:
    """Attention, MLP, RMSNorm and RotaryEmbedding of a family, and its two functions. Raises ValueError by name."""
    if family not in NAMES:
        raise ValueError(f"there are no blocks of the family {family!r}; known are {', '.join(NAMES)}")
    module, prefix = importlib.import_module(f"transformers.models.{family}.modeling_{family}"), NAMES[family]
    parts = {name: getattr(module, f"{prefix}{name}") for name in ("Attention", "MLP", "RMSNorm", "RotaryEmbedding")}
    return SimpleNamespace(
        **parts, apply_rotary=module.apply_rotary_pos_emb, eager_attention=module.eager_attention_forward
    )
