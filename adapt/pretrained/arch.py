"""`model.arch`: a stated shape instead of a reachable one, so that recipes validate and plan anywhere.

    arch: {model_type: qwen3, hidden_size: 4096, num_hidden_layers: 36, num_attention_heads: 32, ...}

The keys are those of the family's transformers config. Where the real config is reachable, the two are compared.
"""

from __future__ import annotations

from typing import Any

from adapt.errors import Problem, UserError, nearest
from adapt.pretrained.families import FAMILIES, REASONS

NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
"""Without these, a family's defaults (one checkpoint's sizes) would silently stand in."""


def arch_config(arch: dict[str, Any]):
    """The transformers config of a stated shape. Raises UserError with every problem."""
    from transformers import AutoConfig

    arch = dict(arch)
    kind = arch.pop("model_type", None)
    if kind not in FAMILIES:
        why = f" ({REASONS[kind]})" if kind in REASONS else ""
        hint = nearest(str(kind), FAMILIES)
        raise UserError(
            Problem("model.arch.model_type", f"must be one of {', '.join(FAMILIES)}; got {kind!r}{why}.{hint}")
        )
    known = set(AutoConfig.for_model(kind).to_dict()) | {"rope_theta", "head_dim"}
    problems = [
        Problem(f"model.arch.{key}", f"a {kind} config has no such key.{nearest(key, known)}")
        for key in sorted(set(arch) - known)
    ]
    problems += [Problem(f"model.arch.{key}", "is required and missing") for key in NEEDED if key not in arch]
    if problems:
        raise UserError(problems)
    try:
        config = AutoConfig.for_model(kind, **arch)
    except Exception as error:  # the config classes validate types strictly, each with its own exception
        raise UserError(Problem("model.arch", " ".join(str(error).split()))) from None
    for key, by in (("num_attention_heads", "num_key_value_heads"),):
        if getattr(config, key) % getattr(config, by):
            raise UserError(
                Problem(
                    f"model.arch.{key}",
                    f"{getattr(config, key)} is not a multiple of {by}={getattr(config, by)}",
                )
            )
    return config


def arch_differences(arch: dict[str, Any], config) -> list[Problem]:
    """Where the stated shape is not that of the real model."""
    real = config.to_dict()
    rope = real.get("rope_parameters") or {}
    problems = []
    for key, stated in arch.items():
        actual = real.get(key, rope.get(key))
        if key == "rope_parameters" and isinstance(stated, dict):
            actual = {k: rope.get(k) for k in stated}
        if actual != stated:
            problems.append(Problem(f"model.arch.{key}", f"the recipe states {stated!r}, but the base has {actual!r}"))
    return problems
