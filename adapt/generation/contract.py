"""What decoding has to know of how a block-diffusion model was trained: the fields its config.json carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Contract:
    block_size: int | None = None
    """Tokens denoised together; null: the whole document."""
    mask_token_id: int | None = None
    """The token of an unknown slot."""
    prediction: str = "shifted"
    """`shifted`: the output before a slot predicts it; `inplace`: its own."""
    context_mask: str = "causal"
    """What committed text sees: `causal`, its whole `block`, or (no block structure at all) the whole `document`."""
    noisy_attention: str = "bidirectional"
    """What slots of a block see of it: all, or (`causal`) what stands before them."""
    block_first: str = "ar"
    """`ar`: the AR head gives the first token of a block; `noisy`: it is denoised like the others."""
    threshold: float = 0.9
    """Probability above which decoding reveals a token, unless it is told otherwise."""

    @property
    def head_first(self) -> bool:
        """Whether decoding takes a block's first token from the AR head: a shifted model has no other output for it (the
        one before it lies in the block before, which is text by then)."""
        return self.prediction == "shifted" or self.block_first == "ar"

    @staticmethod
    def of(config: Any) -> Contract:
        """From a transformers config, or from any mapping; fields it lacks have NBDiff's values."""
        found = config if isinstance(config, Mapping) else vars(config)
        return Contract(**{f.name: found[f.name] for f in fields(Contract) if found.get(f.name) is not None})
