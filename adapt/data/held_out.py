"""What training data is compared with: the held-out sets, and what the evaluation suites ask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapt.components import SourceChoice
from adapt.config.schema import Recipe
from adapt.data.dedup import normal_pieces
from adapt.data.documents import BadRecord, Source
from adapt.data.ngrams import ngrams, word_hashes
from adapt.data.shards import TokenShards
from adapt.errors import UserError


@dataclass(frozen=True)
class HeldOut:
    label: str
    fingerprint: str
    hashes: np.ndarray | None = None
    """Of the normalised documents."""
    signatures: np.ndarray | None = None
    ngrams: Path | None = None
    """File with the sorted hashes of their n-grams; None without decontamination."""


def of_shards(label: str, shards: TokenShards) -> HeldOut:
    return HeldOut(label, shards.fingerprint, shards.hashes(), shards.signatures(), shards.ngrams())


def suite_sources(recipe: Recipe) -> Iterator[tuple[str, SourceChoice]]:
    """(key in the recipe, source) of the suites that bring their own questions (`source`, `sources`); each once."""
    seen: list[SourceChoice] = []
    for index, suite in enumerate(recipe.evaluation.suites):
        for name in ("source", "sources"):
            value = getattr(suite.config, name, None)
            for choice in value if isinstance(value, tuple) else (value,):
                if isinstance(choice, SourceChoice) and choice not in seen:
                    seen.append(choice)
                    yield f"evaluation.suites[{index}].{name}", choice


def write_ngrams(source: Source, n: int, file: Path) -> None:
    """Raises UserError if the source has no document."""
    documents = (d for d in source.documents() if not isinstance(d, BadRecord))
    found = [grams for grams, _ in ngrams((word_hashes(*normal_pieces(d)) for d in documents), n)]
    table = np.unique(np.concatenate([np.empty(0, np.uint64), *found]))
    if not len(table):
        raise UserError(f"{source.where}: there is no document in it to measure on")
    np.save(file, table, allow_pickle=False)
