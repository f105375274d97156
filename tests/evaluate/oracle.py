"""A decoder that answers from what it reads: what a perfect model would score."""

from __future__ import annotations

from collections.abc import Callable

from adapt.generation.ar import ArSampler
from adapt.generation.base import Generation
from tests import tiny


def install(monkeypatch, answer: Callable[[str], str]) -> list[list[int]]:
    """`ar` decoding writes `answer(prompt's text)` and then commas. Returns the list of prompts as they come."""
    tokenizer, seen = tiny.tiny_tokenizer(), []
    comma = tokenizer(",")["input_ids"]

    def generate_batch(self, model, prompts, *, max_new_tokens, eos_ids=(), **_):
        seen.extend(prompts)
        rows = []
        for prompt in prompts:
            said = tokenizer(answer(tokenizer.decode(prompt)))["input_ids"]
            tokens = (said + comma * max_new_tokens)[:max_new_tokens]
            rows.append(Generation(tokens, max_new_tokens, [], "length", 0.0))
        return rows

    monkeypatch.setattr(ArSampler, "generate_batch", generate_batch)
    return seen
