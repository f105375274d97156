"""A weighted mean of a new token's old pieces: later pieces weigh more where it is read, earlier ones where an untied
head predicts it (the linear form of `subword_last`)."""

from __future__ import annotations

from dataclasses import dataclass

from adapt.components import initialisers
from adapt.conversion.initialisers.base import Initialiser, Table


@dataclass(frozen=True, kw_only=True)
class SubwordWeightedConfig:
    pass


@initialisers.register("subword_weighted")
def subword_weighted(config: SubwordWeightedConfig) -> Initialiser:
    def rows(table: Table):
        step = 1 if table.side == "input" else -1
        return table.weighted(lambda k: [2 * i / (k * (k + 1)) for i in range(1, k + 1)][::step])

    return rows
