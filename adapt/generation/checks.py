"""What a model has to state, and to be, before blocks can be decoded with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from adapt.errors import Problem, UserError, nearest
from adapt.generation.contract import Contract
from adapt.generation.rows import Row

KNOWN = {
    "prediction": ("shifted", "inplace"),
    "context_mask": ("causal", "block", "document"),
    "noisy_attention": ("bidirectional", "causal"),
    "block_first": ("ar", "noisy"),
}


def resolve(
    model: nn.Module, eos_ids: Sequence[int], block_size: int | None, mask_id: int | None, threshold: float | None
) -> Contract:
    """The contract of the model's config, with what the sampler's settings say instead; every problem at once."""
    config = model.config
    own = {"block_size": block_size, "mask_token_id": mask_id, "threshold": threshold}
    contract = replace(Contract.of(config), **{k: v for k, v in own.items() if v is not None})
    problems = [*_unknown(contract), *_block_size(contract, config), *_mask_token(contract, config, eos_ids)]
    if not 0 < contract.threshold <= 1:
        problems.append(Problem("threshold", f"the model's config states {contract.threshold}; it must lie in (0, 1]"))
    attention = config._attn_implementation
    if "flash" in attention or "flex" in attention:
        problems.append(
            Problem("attention", f"{attention!r} takes no mask of ours; load the model with attn_implementation='sdpa'")
        )
    if problems:
        raise UserError(problems)
    return contract


def _unknown(contract: Contract) -> Iterator[Problem]:
    for key, known in KNOWN.items():
        value = getattr(contract, key)
        if value not in known:
            yield Problem(
                key, f"the model's config states {value!r}; known are {', '.join(known)}.{nearest(str(value), known)}"
            )


def _block_size(contract: Contract, config: Any) -> Iterator[Problem]:
    size = contract.block_size
    if size is None:
        if contract.context_mask != "document":
            yield Problem("block_size", "the model's config does not state one; give it (8 to 32 is usual)")
        return
    if size < 1:
        yield Problem("block_size", f"the model's config states {size}; a block has 1 token or more")
    context, window = getattr(config, "max_position_embeddings", None), sliding_window(config)
    if context is not None and size > context:
        yield Problem("block_size", f"{size} is beyond the model's context of {context:,d} tokens")
    elif window is not None and size > window:
        yield Problem(
            "block_size",
            f"{size} is beyond the model's sliding window of {window:,d} tokens, and a block must see all of itself: "
            f"take {window} or less",
        )


def _mask_token(contract: Contract, config: Any, eos_ids: Sequence[int]) -> Iterator[Problem]:
    mask_id = contract.mask_token_id
    if mask_id is None:
        yield Problem("mask_token_id", "the model's config does not state one: is it a block-diffusion model?")
    elif not 0 <= mask_id < config.vocab_size:
        yield Problem("mask_token_id", f"{mask_id} is outside the vocabulary of {config.vocab_size:,d}")
    elif mask_id in eos_ids:
        yield Problem("mask_token_id", f"{mask_id} is also an EOS token; decoding could never tell them apart")


def check_layers(model: nn.Module, rows: list[Row]) -> None:
    """A block sees all of its context, which a sliding window would cut, and leaves no trace before its commit."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionLayer

    layers = DynamicCache(config=model.config).layers
    if any(isinstance(layer, LinearAttentionLayer) or not isinstance(layer, DynamicLayer) for layer in layers):
        raise UserError(
            "block diffusion takes a block back from the cache after every step, and this model has layers with a "
            "running state (linear attention), which cannot be taken back: use the `ar` sampler"
        )
    window = sliding_window(model.config)
    longest = max((len(r.prompt) + r.limit for r in rows), default=0)
    if window is not None and longest > window:
        raise UserError(
            f"prompt and new tokens come to {longest:,d}, beyond the sliding window of {window:,d}, and "
            f"block diffusion decodes within the window only: ask for fewer tokens, or use the `ar` sampler"
        )


def sliding_window(config: Any) -> int | None:
    """The narrowest of the model's layers; None where all see everything."""
    from transformers.cache_utils import DynamicCache

    layers = DynamicCache(config=config).layers
    return min((layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)), default=None)


def block_size_problems(sampler: str, own: int | None, recipe: Any) -> Iterator[Problem]:
    """A recipe whose sampler would find no block size, in its settings or in the model that is trained."""
    stated = hasattr(recipe.objective.config, "block_size") or "block_size" in (recipe.model.arch or {})
    if own is None and not stated:
        yield Problem(
            "",
            f"{sampler} needs a block size, and the objective {recipe.objective.name!r} has none: write "
            f"{{name: {sampler}, block_size: 8}}, or decode with ar",
        )
