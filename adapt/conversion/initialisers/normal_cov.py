"""The mean of the trained rows, and a little of their spread: no two new tokens start alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from adapt.components import initialisers
from adapt.conversion.initialisers.base import Initialiser, gaussian
from adapt.errors import Problem


@dataclass(frozen=True, kw_only=True)
class NormalCovConfig:
    alpha: float = 0.01
    """The new rows' covariance is this times that of the trained ones; 0.01 to 1 is usual."""

    def problems(self, recipe) -> Iterator[Problem]:
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            yield Problem("", f"alpha={self.alpha} must be above 0; 0.01 to 1 is usual, and `mean` is the limit at 0")


@initialisers.register("normal_cov")
def normal_cov(config: NormalCovConfig) -> Initialiser:
    return lambda table: gaussian(table, table.mean, table.rows[table.trained], config.alpha)
