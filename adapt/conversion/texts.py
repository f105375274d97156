"""The texts that an initialiser of new rows may learn from, as tokens of the extended tokenizer.

They are prepared as training data is: cleaned, deduplicated, without the held-out documents, tokenised by worker
processes, kept in the cache; so every rank reads the same, and a run that trains on them has them already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from adapt.components import CleanerChoice, SourceChoice
from adapt.config.schema import Dataset, Recipe
from adapt.errors import Problem, UserError


@dataclass(frozen=True, kw_only=True)
class Text:
    source: SourceChoice
    """Where documents come from; `path:FOLDER` is short for `{name: path, path: FOLDER}`."""
    clean: tuple[CleanerChoice, ...] = ()
    """Cleaning steps, in order, after those that a corpus brings."""


@dataclass(frozen=True, eq=False)
class Extension:
    """What the new rows are for. Nothing is read before it is asked for."""

    recipe: Recipe
    ids: Sequence[int]
    """[N] of the new tokens, ascending."""

    def documents(self, texts: Sequence[Text], max_tokens: int) -> Documents:
        """About `max_tokens` of `texts` (none: the training data that is not replay), the same share of each. Raises
        UserError with `texts[i].source` for what cannot be read."""
        from adapt.conversion.base import planned_tokenizer
        from adapt.data.prepare import prepare

        share = max_tokens // max(1, len(texts) or len(learned(self.recipe)))
        asked = tuple(Dataset(source=t.source, clean=t.clean, max_tokens=share) for t in texts)
        data = dataclasses.replace(self.recipe.data, train=asked or learned(self.recipe))
        recipe = dataclasses.replace(self.recipe, data=data)
        try:
            shards = prepare(recipe, planned_tokenizer(recipe), progress=False).train
        except UserError as error:
            if not texts:
                raise
            renamed = [Problem(p.where.replace("data.train", "texts"), p.what) for p in error.problems]
            raise type(error)(renamed) from None
        return Documents(shards, share)


def learned(recipe: Recipe) -> tuple[Dataset, ...]:
    """The training data that is new to the model."""
    return tuple(dataset for dataset in recipe.data.train if not dataset.replay)


@dataclass(frozen=True, eq=False)
class Documents:
    """Token ids of documents, the same whenever they are gone through."""

    shards: Sequence
    """TokenShards of each text."""
    share: int
    """Tokens read of each text, at the end of a document."""

    def __iter__(self) -> Iterator[np.ndarray]:
        for shards in self.shards:
            offsets = shards.document_offsets
            for i in range(int(np.searchsorted(offsets[:-1], self.share))):
                yield shards.tokens(int(offsets[i]), int(offsets[i + 1]))
