"""Which models can be adapted. The others are refused by name, with the reason, before any weight is loaded."""

from __future__ import annotations

from adapt.errors import Problem

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

REASONS = {
    "gpt2": "learned absolute positions: packed documents and two streams need rotary ones",
    "gpt_neo": "learned absolute positions and local attention",
    "gpt_neox": "parallel attention and partial rotary embeddings, not tested here",
    "opt": "learned absolute positions",
    "bloom": "ALiBi: its bias is added to the scores, outside the attention layouts",
    "mpt": "ALiBi: its bias is added to the scores, outside the attention layouts",
    "falcon": "multi-query attention of its own, not tested here",
    "gemma": "scaled embeddings and zero-centred norms, not tested here",
    "gemma2": "soft-capped attention scores, which SDPA cannot compute, and sliding windows",
    "gemma3_text": "sliding windows alternating with full attention",
    "gemma3": "an image-text model with sliding windows",
    "phi3": "fused projections and LongRoPE, not tested here",
    "gpt_oss": "attention sinks, which SDPA cannot compute, sliding windows and experts",
    "mixtral": "a mixture of experts: routing and its balance loss are not implemented",
    "qwen2_moe": "a mixture of experts: routing and its balance loss are not implemented",
    "qwen3_moe": "a mixture of experts: routing and its balance loss are not implemented",
    "deepseek_v3": "a mixture of experts (without them, as conversions to latent attention export it, it is known)",
    "qwen3_next": "linear attention layers; convert from an attention-only model instead",
    "qwen3_5_text": "linear attention layers; convert from an attention-only model instead",
    "mamba": "no attention to lay out",
    "mamba2": "no attention to lay out",
    "PanguEmbedded": "openPangu's own architecture, in its repository's code alone",
    "t5": "an encoder-decoder, not a causal language model",
    "bert": "an encoder, not a causal language model",
}


def family_problems(config, *, seq_len: int | None = None, trusted: bool = False) -> list[Problem]:
    """`trusted`: the user runs the repository's own code; the start-up probe then judges its attention."""
    kind = family(config)
    problems = []
    remote = trusted and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if kind not in FAMILIES and not remote and not dense_latent(config):
        problems.append(unsupported(kind))
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        problems.append(
            Problem(
                "model.base",
                f"its weights are quantised ({method}) and cannot be trained; use the original, or a .gguf file",
            )
        )
    for key in ("attn_logit_softcapping", "attn_logit_soft_cap"):
        if getattr(config, key, None):
            problems.append(
                Problem("model.base", f"{key}={getattr(config, key)}: soft-capped scores are not supported")
            )
    if "sink" in str(getattr(config, "attention_sink", "") or getattr(config, "attn_sinks", "")):
        problems.append(Problem("model.base", "attention sinks are not supported"))
    window = sliding_window(config)
    if window and seq_len and seq_len > window:
        problems.append(
            Problem(
                "data.seq_len",
                f"{seq_len} tokens are more than the model's sliding window of {window}, and attention layouts have no "
                f"window; use at most {window}",
            )
        )
    return problems


def family(config) -> str:
    """The family whose blocks a model has: its own, or that of the base a student was made of."""
    return getattr(config, "base_model_type", None) or config.model_type


def dense_latent(config) -> bool:
    """DeepseekV3 without experts: what a conversion to latent attention exports."""
    if config.model_type != "deepseek_v3":
        return False
    return config.first_k_dense_replace >= config.num_hidden_layers and not config.num_nextn_predict_layers


def unsupported(kind: str) -> Problem:
    why = f": {REASONS[kind]}" if kind in REASONS else ""
    known = "Llama (with SmolLM2), Mistral, Qwen2 (with Qwen2.5) and Qwen3"
    return Problem("model.base", f"the {kind} family is not supported{why}. Supported: {known}")


def sliding_window(config) -> int | None:
    """Tokens a layer can look back at most, where that is less than everything; null without such a layer."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if not window or (types and "sliding_attention" not in types):
        return None
    return int(window)


def longest_row(config) -> int | None:
    """Tokens the model's positions are made for."""
    return getattr(config, "max_position_embeddings", None)
