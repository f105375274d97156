"""A table of results that the report draws: cells are too many for metrics, and too telling to be averaged away."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Grid:
    suite: str
    """What was measured; one plot of the report."""
    model: str = ""
    """Whose it is, where that is not the student: drawn beside it."""
    unit: str = "% right"
    """What cells are: fractions where it begins with %."""
    rows: tuple[str, ...]
    """Names of the rows, `256`, ..."""
    columns: tuple[str, ...]
    """Names of the columns, `0-10`, ..."""
    row_title: str = "tokens"
    column_title: str = "depth (%)"
    cells: tuple[tuple[float | None, ...], ...]
    """[rows][columns]; None where nothing was asked."""
    trials: int
    """Trials in a cell, at least."""

    @property
    def title(self) -> str:
        return f"{self.suite}{f' ({self.model})' if self.model else ''}, {self.unit}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def depth_names(depths: int) -> tuple[str, ...]:
    """Of equal parts of the text in percent: `0-10`, `10-20`, ..."""
    return tuple(f"{100 * i / depths:.3g}-{100 * (i + 1) / depths:.3g}" for i in range(depths))
