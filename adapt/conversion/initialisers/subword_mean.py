"""A new token starts as the mean of the old tokens its text was made of (FVT, Gee et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from adapt.components import initialisers
from adapt.conversion.initialisers.base import Initialiser


@dataclass(frozen=True, kw_only=True)
class SubwordMeanConfig:
    pass


@initialisers.register("subword_mean")
def subword_mean(config: SubwordMeanConfig) -> Initialiser:
    return lambda table: table.weighted(lambda k: [1 / k] * k)
