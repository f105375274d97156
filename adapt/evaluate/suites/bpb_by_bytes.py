"""Bits per byte where each row holds the same bytes for every tokenizer (tokenizer-extension spec, C.3).

    bpb_by_bytes/<dataset>      nats of all scored tokens / ln 2 / bytes of their text
    tokens_per_byte/<dataset>   what the text costs in tokens

`bpb` has rows of `data.seq_len` tokens, in which a tokenizer with longer tokens sees more text, and `evaluation.limit`
rows of them are more text: it compares at equal tokens. Here rows are cut every `row_bytes` bytes, and the first
`evaluation.limit` of them are the same text for all: it compares at equal bytes. (Held-out sets with `max_tokens` end
elsewhere for each tokenizer; leave it out.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from adapt.components import suites
from adapt.errors import Problem
from adapt.evaluate.context import EvalContext, Suite
from adapt.evaluate.suites.bpb import nats_and_bytes, per_byte


@dataclass(frozen=True, kw_only=True)
class BpbByBytesConfig:
    row_bytes: int = 1024
    """Bytes of text in a row, which is also the longest context."""

    def metrics(self, recipe, datasets: list[str]) -> list[str]:
        return [f"{what}/{label}" for label in datasets for what in ("bpb_by_bytes", "tokens_per_byte")]

    def problems(self, recipe) -> Iterator[Problem]:
        if self.row_bytes < 16:
            yield Problem("", f"row_bytes={self.row_bytes} leaves no context; 1024 to 4096 are usual")
        for index, dataset in enumerate(recipe.data.eval):
            if dataset.max_tokens is not None:
                yield Problem(
                    f"data.eval[{index}].max_tokens",
                    f"{dataset.max_tokens} tokens are another text for every tokenizer, and bpb_by_bytes compares the "
                    "same text; leave it out (evaluation.limit says how many rows are measured)",
                )


@suites.register("bpb_by_bytes")
def bpb_by_bytes(config: BpbByBytesConfig) -> Suite:
    return partial(measure, config.row_bytes)


def measure(row_bytes: int, context: EvalContext) -> dict[str, float]:
    results = {}
    for label in context.datasets:
        sums = nats_and_bytes(context, label, row_bytes)
        results[f"bpb_by_bytes/{label}"] = per_byte(sums)
        results[f"tokens_per_byte/{label}"] = sums["tokens"] / sums["bytes"] if sums["bytes"] else math.nan
    return results
