"""Packed batches built by hand: documents of given lengths, optional prompts, padding at the end."""

from __future__ import annotations

import torch

from adapt.data.batch import CONTEXT, PAD, TARGET, Batch


def packed(
    lengths: list[list[int]],
    *,
    vocab: int = 320,
    seed: int = 0,
    prompt: int = 0,
    pad: int = 0,
    index: int = 0,
) -> Batch:
    """A row per inner list, its numbers the documents' lengths; the first `prompt` tokens of each are CONTEXT."""
    generator = torch.Generator().manual_seed(seed)
    width = max(map(sum, lengths)) + pad
    shape = (len(lengths), width)
    ids = torch.randint(4, vocab, shape, generator=generator)
    doc, pos = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    role = torch.full(shape, TARGET, dtype=torch.int8)
    for row, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents):
            span = slice(start, start + length)
            doc[row, span], pos[row, span] = number, torch.arange(length)
            role[row, start : start + min(prompt, length)] = CONTEXT
            start += length
        rest = width - start
        doc[row, start:] = len(documents) + torch.arange(rest)
        role[row, start:], ids[row, start:] = PAD, 2
    labels = torch.where((role == TARGET) & (pos > 0), ids, -100)
    rows = torch.arange(len(lengths))
    return Batch(
        input_ids=ids,
        labels=labels,
        doc_ids=doc,
        position_ids=pos,
        role=role,
        loss_weight=(role != PAD).float(),
        sample_index=rows + index,
        epoch=torch.zeros_like(rows),
        source=torch.zeros_like(rows),
        pair_index=-torch.ones_like(rows),
    )
