"""Run suites in order; show what they found."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from adapt.components import SuiteChoice
from adapt.console import printable
from adapt.evaluate.context import EvalContext
from adapt.evaluate.grid import Grid

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger("adapt.evaluate")
LONG = 10.0
"""Seconds after which an evaluation says what it is at."""


def evaluate(choices: Iterable[SuiteChoice], context: EvalContext) -> dict[str, float]:
    """All metrics of the suites, in their order. Collective."""
    results: dict[str, float] = {}
    choices, began = list(choices), time.perf_counter()
    for number, choice in enumerate(choices, 1):
        started = time.perf_counter()
        if started - began > LONG:
            context.say(f"evaluating: {choice.name} ({number} of {len(choices)})")
        found = choice.build()(context)
        log.debug("suite %s: %d metrics in %.1f s", choice.name, len(found), time.perf_counter() - started)
        results |= found
    return results


def results_table(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """A row per metric: before, after, change in percent. Without `before`, one column of values."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="held-out results", title_justify="left")
    table.add_column("metric", overflow="fold")
    columns = ("before", "after", "change") if before else ("value",)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for metric in [*after, *(m for m in before if m not in after)]:
        values = [before.get(metric), after.get(metric)] if before else [after[metric]]
        cells = ["–" if v is None else f"{v:.4g}" for v in values]
        if before:
            cells.append(change(*values))
        table.add_row(Text(printable(metric)), *cells)  # it ends in the name of a dataset
    return table


def grid_table(grid: Grid) -> Table:
    """Percent where cells are fractions."""
    from rich.table import Table

    def shown(cell: float | None) -> str:
        return "" if cell is None else f"{100 * cell:.0f}" if grid.unit.startswith("%") else f"{cell:.3f}"

    table = Table(title=grid.title, title_justify="left")
    table.add_column(f"{grid.row_title} \\ {grid.column_title}")
    for column in grid.columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, cells in zip(grid.rows, grid.cells, strict=True):
        table.add_row(name, *map(shown, cells))
    return table


def change(before: float | None, after: float | None) -> str:
    """`-12.3 %`, or nothing where that has no meaning."""
    if not before or after is None or not math.isfinite(before + after):
        return ""
    return f"{100 * (after - before) / abs(before):+.1f} %"


def print_grids(grids: Iterable[Grid]) -> None:
    from rich.console import Console

    for grid in grids:
        Console().print(grid_table(grid))


def print_results(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    from rich.console import Console

    Console().print(results_table(before, after))
