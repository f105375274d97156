"""A new token starts as the first of its old pieces. On the head it then competes exactly where that piece did."""

from __future__ import annotations

from dataclasses import dataclass

from adapt.components import initialisers
from adapt.conversion.initialisers.base import Initialiser


@dataclass(frozen=True, kw_only=True)
class SubwordFirstConfig:
    pass


@initialisers.register("subword_first")
def subword_first(config: SubwordFirstConfig) -> Initialiser:
    return lambda table: table.weighted(lambda k: [1.0] + [0.0] * (k - 1))
