"""The texts a run shows at its end: each prompt through each sampler, with the order in which tokens were revealed."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from adapt.components import SamplerChoice
from adapt.generation.load import eos_ids


def sample(model: nn.Module, tokenizer, prompt: str, choice: SamplerChoice, max_new_tokens: int) -> dict[str, Any]:
    """A JSON-ready record: prompt, sampler, text, forwards, tokens_per_forward, reveal [[token text, step], ...]."""
    ids = tokenizer(prompt)["input_ids"]
    result = choice.build().generate(model, ids, max_new_tokens=max_new_tokens, eos_ids=eos_ids(model, tokenizer))
    tokens = [int(t) for t in result.tokens]
    steps = dict(result.reveal_order)
    config = choice.config
    changed = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
    return {
        "prompt": prompt,
        "sampler": " ".join([choice.name, *(f"{key} {getattr(config, key)}" for key in changed)]),
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "forwards": result.forwards,
        "tokens_per_forward": result.tokens_per_forward,
        "reveal": [[tokenizer.decode([t]), steps.get(i, 0)] for i, t in enumerate(tokens)],
    }
