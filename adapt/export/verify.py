"""Is the exported folder the trained model? Loaded as a stranger would, compared in the dtype it was written in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapt.export.code import own_class
from adapt.pretrained.quiet import quiet

TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1969, three people flew to the moon; two of them walked on it.\n"
    "def add(a, b):\n    return a + b\n"
)

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-3}
"""Largest logit difference allowed between the folder and the model it was made of, relative to the largest logit. The
weights are equal bit for bit; what remains is the order of summation, which may depend on memory alignment: about one
unit in the last place."""

ROUNDING = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}
"""Largest relative distance (2-norm) between the logits of the trained model and of the export. Casting weights to
bfloat16 (3 digits) moves the logits of a deep model by a few percent; a lost adapter or a wrong RoPE by far more."""


def reload(folder: Path, dtype: str):
    import torch
    from transformers import AutoModelForCausalLM

    loader = own_class(folder) or AutoModelForCausalLM
    with quiet():
        return loader.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()


def outline(folder: Path, dtype: str):
    """What `reload` gives, with its parameters on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    own, kind = own_class(folder), {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
    with torch.device("meta"), quiet():
        if own is not None:
            return own._from_config(own.config_class.from_pretrained(folder), **kind).eval()
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **kind).eval()


def compare(reloaded, stock, *, trained, tokenizer) -> dict[str, Any]:
    """Raises RuntimeError unless all three agree; returns what was measured. `stock`: the cast copy written."""
    import torch

    dtype = str(stock.dtype).removeprefix("torch.")
    theirs, ours = reloaded.state_dict(), stock.state_dict()
    if theirs.keys() != ours.keys():
        raise RuntimeError(f"the export loads with other weights: {', '.join(sorted(theirs.keys() ^ ours.keys())[:5])}")
    if wrong := [name for name, weight in ours.items() if not torch.equal(weight, theirs[name])]:
        raise RuntimeError(f"the export changed {len(wrong)} weights, the first is {wrong[0]}")
    ids = ids_of(tokenizer, stock.config)
    with torch.inference_mode():
        reference = logits(trained, ids)
        written, again = logits(stock, ids), logits(reloaded, ids)
    off = float((again - written).abs().max() / written.abs().max())
    if not off <= TOLERANCE[dtype]:
        raise RuntimeError(f"the export's logits differ by {off:.1e} of the largest (tolerance {TOLERANCE[dtype]:.0e})")
    found = closeness(written, reference, dtype, ROUNDING[dtype])
    return found | {"reload_difference": off} | cache_bytes(reloaded, ids)


def ids_of(tokenizer, config):
    """[1, T]: a fixed text, within the model's positions."""
    return tokenizer(TEXT, return_tensors="pt")["input_ids"][:, : config.max_position_embeddings]


def closeness(written, reference, dtype: str, tolerance: float) -> dict[str, Any]:
    """Logits [1, T, V] of the folder, which is in `dtype`, against those of the trained model. Raises RuntimeError where they
    are further apart than rounding explains."""
    drift = float((written - reference).norm() / reference.norm())
    agree = float((written.argmax(-1) == reference.argmax(-1)).float().mean())
    if not drift <= tolerance:
        raise RuntimeError(
            f"the export is not the trained model: its logits are {drift:.1%} away, where rounding to {dtype} explains "
            f"{tolerance:.1%}"
        )
    return {"dtype": dtype, "rounding_difference": drift, "same_top_token": agree}


def cache_bytes(model, ids) -> dict[str, float]:
    """What decoding a row really keeps: bytes per token, and bytes besides (state). ids [1, T], T at least 2."""
    import torch

    def held(length: int) -> int:
        with torch.no_grad():
            cache = model(ids[:, :length].to(model.device), use_cache=True).past_key_values
        kept = [value for layer in cache.layers for value in vars(layer).values()]
        kept = [t for value in kept for t in (value.values() if isinstance(value, dict) else [value])]
        return sum(t.numel() * t.element_size() for t in kept if isinstance(t, torch.Tensor))

    half = ids.shape[1] // 2
    growing = (held(2 * half) - held(half)) / half
    return {"cache_bytes_per_token": growing, "state_bytes": held(half) - half * growing}


def logits(model, ids):
    """[B, T, V] fp32, with stock causal attention, whatever the model was trained with."""
    attention, training = model.config._attn_implementation, model.training
    try:
        model.eval()
        if attention != "sdpa":
            model.set_attn_implementation("sdpa")
        return model(ids.to(model.device), use_cache=False).logits.float().cpu()
    finally:
        if attention != "sdpa":
            model.set_attn_implementation(attention)
        model.train(training)
