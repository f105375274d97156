"""The cache of a layer that keeps a state of fixed size, in transformers' terms.

transformers' own LinearAttentionLayer counts no tokens, so a stack without any attention layer could neither say how
far it is nor prepare a mask, and rows could not be taken out of a batch. This one can: it is a layer like others.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class StateLayer(CacheLayerMixin):
    """States by name, each [B, ...]; None before the first token. The mixer reads and replaces them."""

    supports_early_init = False
    is_sliding = False

    def __init__(self, **kwargs):
        super().__init__()
        self.states: dict[str, Tensor] | None = None
        self.seen = 0

    def advance(self, states: dict[str, Tensor], tokens: int) -> None:
        """Take the states after `tokens` more tokens."""
        self.states, self.seen, self.is_initialized = states, self.seen + tokens, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a recurrent layer has no keys and values to initialise")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        raise NotImplementedError("a recurrent layer keeps a state, not keys and values: see `advance`")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def numel(self) -> int:
        """Numbers kept, whatever the length."""
        return sum(s.numel() for s in (self.states or {}).values())

    def reset(self) -> None:
        self.states, self.seen, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a running state cannot be taken back: no assisted decoding with recurrent layers")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda s: s.index_select(0, indices.to(s.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda s: s.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        self._each(lambda s: s.cpu())

    def prefetch(self) -> None:
        """States come back to the device with the tokens that read them."""

    def _each(self, change) -> None:
        if self.states is not None:
            self.states = {name: change(state) for name, state in self.states.items()}
