"""Which embedding rows have learned something: an average should be over those.

By name: tokens that no text contains never trained. By their rows: a token that was in no training text stays where
such rows stay, near the rows that are known to be untrained (Land and Bartolo 2024, "Fishing for Magikarp", whose
indicator is the distance to the mean of those).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FEW = 0.05
"""More than this share of all tokens cannot be untrained: the indicator then tells nothing of this model."""


@torch.no_grad()
def trained_rows(tokenizer: Any, config: Any, embedding: Tensor) -> Tensor:
    """[R] bool of an embedding [R, d]; `tokenizer` and `config` are those it was trained with."""
    from adapt.conversion.mask_token import RESERVED
    from adapt.tokenization.vocabulary import Vocabulary

    rows, vocabulary = embedding.float(), Vocabulary.of(tokenizer, config)
    trained = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    trained[_below(vocabulary.ordinary, rows)] = True
    learned_elsewhere = [i for i, token in tokenizer.added_tokens_decoder.items() if not RESERVED.match(token.content)]
    untrained = ~trained  # padding, reserved tokens, pieces that no merge makes
    untrained[_below([*vocabulary.special, *learned_elsewhere], rows)] = False
    looks = rows.norm(dim=1) == 0
    if untrained.sum() >= 2:
        distance = (rows - rows[untrained].mean(0)).norm(dim=1)
        near = distance <= distance[untrained].quantile(0.9)
        if (near & trained).sum() <= FEW * trained.sum():
            looks |= near
    return trained & ~looks


def _below(ids: Any, rows: Tensor) -> Tensor:
    return torch.tensor([int(i) for i in ids if i < len(rows)], dtype=torch.int64, device=rows.device)
