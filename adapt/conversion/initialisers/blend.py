"""Between the mean of all trained rows and another start: mu + share * (other - mu).

With tied matrices the pieces' own mean lets a new token compete with its parts on old text, which the mean of all does
not; half of each keeps some of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from adapt.components import InitialiserChoice, initialisers
from adapt.conversion.base import named
from adapt.conversion.initialisers.base import Initialiser, Table
from adapt.conversion.initialisers.subword_mean import SubwordMeanConfig
from adapt.errors import Problem


@dataclass(frozen=True, kw_only=True)
class BlendConfig:
    of: InitialiserChoice = field(default_factory=lambda: InitialiserChoice("subword_mean", SubwordMeanConfig()))
    """The other start."""
    share: float = 0.5
    """How much of it: 0 is `mean`, 1 is the other alone."""

    def problems(self, recipe) -> Iterator[Problem]:
        if not 0 <= self.share <= 1:
            yield Problem("", f"share={self.share} must be between 0 (the mean of all) and 1 (the other start alone)")


@initialisers.register("blend")
def blend(config: BlendConfig) -> Initialiser:
    other = config.of.build()

    def rows(table: Table):
        with named("of"):
            start = other(table)
        return table.mean + config.share * (start - table.mean)

    return rows
