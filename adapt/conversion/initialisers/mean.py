"""Every new token starts as the mean of the trained ones.

On the head this protects old text: one more row at the mean cannot take more than its share of the probability, so
-log p of an old token rises by at most log(1 + N/|T|), by Jensen's inequality (Hewitt 2021, "Initializing new word
embeddings for pretrained language models")."""

from __future__ import annotations

from dataclasses import dataclass

from adapt.components import initialisers
from adapt.conversion.initialisers.base import Initialiser, Table


@dataclass(frozen=True, kw_only=True)
class MeanConfig:
    pass


@initialisers.register("mean")
def mean(config: MeanConfig) -> Initialiser:
    return Table.means
