"""A new token is read as the last of its old pieces, and predicted (by an untied head) as the first.

The last piece is where the old model had the whole word in view, the first is where it decided for the word
(mergekit's `first_last`)."""

from __future__ import annotations

from dataclasses import dataclass

from adapt.components import initialisers
from adapt.conversion.initialisers.base import Initialiser, Table


@dataclass(frozen=True, kw_only=True)
class SubwordLastConfig:
    pass


@initialisers.register("subword_last")
def subword_last(config: SubwordLastConfig) -> Initialiser:
    def rows(table: Table):
        others, one = lambda k: [0.0] * (k - 1), [1.0]
        return table.weighted(lambda k: others(k) + one if table.side == "input" else one + others(k))

    return rows
