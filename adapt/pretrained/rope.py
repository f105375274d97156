"""`model.rope_scaling`: the recipe's RoPE parameters over the base's, and how far they reach."""

from __future__ import annotations

from typing import Any

from adapt.errors import Problem, UserError, nearest

WHERE = "model.rope_scaling"
KEYS = (
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "short_factor",
    "long_factor",
    "low_freq_factor",
    "high_freq_factor",
    "partial_rotary_factor",
)


def apply_rope(config, over: dict[str, Any] | None) -> None:
    """Changes `config` in place. A scaled RoPE extends `max_position_embeddings` to what its factor says."""
    if not over:
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if unknown := sorted(set(over) - set(KEYS)):
        raise UserError(
            [
                Problem(f"{WHERE}.{k}", f"is no RoPE parameter.{nearest(k, KEYS)} Known: {', '.join(KEYS)}")
                for k in unknown
            ]
        )
    base = dict(config.rope_parameters or {})
    over = {("rope_type" if key == "type" else key): value for key, value in over.items()}
    kind = over.get("rope_type", base.get("rope_type", "default"))
    if kind not in ("default", *ROPE_INIT_FUNCTIONS):
        known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS}))
        raise UserError(Problem(f"{WHERE}.rope_type", f"is one of {known}; got {kind!r}"))
    if kind == base.get("rope_type", "default"):
        merged = {**base, **over}
    else:  # the parameters of another type would only be dead weight
        merged = {"rope_theta": base.get("rope_theta", 10000.0), **over}
    merged["rope_type"] = kind
    trained = config.max_position_embeddings
    if base.get("rope_type") == "linear":
        trained = round(trained / base.get("factor", 1.0))
    trained = base.get("original_max_position_embeddings") or trained
    if kind in ("yarn", "llama3", "longrope"):
        trained = merged.setdefault("original_max_position_embeddings", trained)
    factor = merged.get("factor")
    if kind not in ("default", "longrope") and not (isinstance(factor, int | float) and factor >= 1):
        raise UserError(Problem(f"{WHERE}.factor", f"{kind} RoPE needs a factor of at least 1; got {factor!r}"))
    config.rope_parameters = merged
    try:
        config.validate_rope()
    except (KeyError, ValueError) as error:
        raise UserError(Problem(WHERE, str(error.args[0]))) from None
    if factor and kind != "default":
        config.max_position_embeddings = max(config.max_position_embeddings, int(trained * factor))
