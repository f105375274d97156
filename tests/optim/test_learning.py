"""A tiny language model learns at least as fast with COSMOS as with AdamW at its best rate."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from adapt.components import optimizers
from tests import tiny
from tests.recipes import WORDS

STEPS = 60


def batches(tokenizer) -> Iterator[torch.Tensor]:
    """A made-up language: every word is followed by one of two others."""
    rng = random.Random(0)
    follow = {word: rng.sample(WORDS, 2) for word in WORDS}
    for _ in range(STEPS):
        rows = []
        for _ in range(8):
            words = [rng.choice(WORDS)]
            for _ in range(40):
                words.append(rng.choice(follow[words[-1]]))
            rows.append(tokenizer(" ".join(words))["input_ids"][:48])
        yield torch.tensor(rows)


def final_loss(tokenizer, name: str, **fields) -> float:
    """Mean of the last ten steps' losses, from the same start on the same tokens."""
    model = tiny.tiny_model("llama", num_hidden_layers=1).train()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.02)
    entry = optimizers[name]
    optimizer, losses = entry.factory(entry.config_type(**fields), model), []
    for ids in batches(tokenizer):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def test_invariant_23_cosmos_learns_as_fast_as_tuned_adamw(tokenizer):
    """AdamW's best of 0.003, 0.01 and 0.03 is 0.01, with 0.48 (1.96 and 0.76 at the others); COSMOS has 0.26."""
    adamw = final_loss(tokenizer, "adamw", lr=0.01)
    assert adamw < 0.6
    assert final_loss(tokenizer, "cosmos", lr=0.03, rank=8, weight_decay=0.0) < adamw
