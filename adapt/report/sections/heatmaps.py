"""What was found where: grids of suites that go over lengths and depths. Side by side stand the models that the student is
compared with, and the student before and after."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from adapt.components import sections
from adapt.report.data import RunData, is_number
from adapt.report.figure import QUIET, inline

COLOURS = "cividis"
"""From dark blue (0 %) to yellow (100 %), read alike by the colour-blind."""
UNIT = "% right"
"""Of grids that are drawn here."""
PALE = 0.5
"""Fraction from which a cell is so light that its number is dark."""


@dataclass(frozen=True, kw_only=True)
class HeatmapsConfig:
    order: int = 25
    """Place on the page; lower comes first."""
    title: str = "Found, by length and depth"
    """Heading."""


@sections.register("heatmaps")
def heatmaps(config: HeatmapsConfig):
    def html(runs: list[RunData]) -> str | None:
        plots = [
            f"<figure><figcaption>{_dot(run, len(runs) > 1)}{escape(suite)}, % right, of {trials} trials a cell"
            f"</figcaption>{_plot(suite, panels)}</figure>"
            for run in runs
            for suite, trials, panels in _panels(run)
        ]
        return f'<div class="plots grids">{"".join(plots)}</div>' if plots else None

    return html


def _dot(run: RunData, many: bool) -> str:
    return f'<span class="dot" style="background:{run.colour}"></span>{escape(run.name)}: ' if many else ""


def _panels(run: RunData) -> list[tuple[str, Any, list[tuple[str, dict[str, Any]]]]]:
    """(suite, trials, titled grids) of every suite: the last of each other model, the first and the last of the student;
    whatever has not the shape of the student's last is left out."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for grid in run.grids:
        if whole(grid) and grid.get("unit", UNIT) == UNIT:
            found.setdefault(grid["suite"], {}).setdefault(str(grid.get("model") or ""), []).append(grid)
    panels = []
    for suite, by_model in found.items():
        own = by_model.pop("", [])
        measured = own[-1] if own else next(iter(by_model.values()))[-1]
        shown = [(model, grids[-1]) for model, grids in by_model.items()]
        student = "student, " if shown else ""
        shown += [(f"{student}step {grid['step']:,}", grid) for grid in (own if len(own) < 2 else [own[0], own[-1]])]
        alike = [(title, g) for title, g in shown if all(g[key] == measured[key] for key in ("rows", "columns"))]
        panels.append((suite, measured.get("trials", ""), alike))
    return panels


def whole(grid: dict[str, Any]) -> bool:
    rows, columns, cells = (grid.get(key) for key in ("rows", "columns", "cells"))
    if not (isinstance(grid.get("suite"), str) and all(isinstance(x, list) and x for x in (rows, columns, cells))):
        return False
    return len(cells) == len(rows) and all(isinstance(r, list) and len(r) == len(columns) for r in cells)


def _plot(suite: str, panels: list[tuple[str, dict[str, Any]]]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    rows, columns = panels[0][1]["rows"], panels[0][1]["columns"]
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        size = (max(2.7, 0.42 * len(columns) + 0.9) * max(2, len(panels)), 0.3 * len(rows) + 1.1)
        figure = Figure(figsize=size, layout="constrained")
        many = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, grid) in zip(many, panels, strict=True):
            _draw(axes, grid)
            axes.set_title(title, fontsize=9, color=QUIET)
            axes.set_xlabel(str(grid.get("column_title", "")), fontsize=8, color=QUIET)
        figure.axes[0].set_ylabel(str(panels[0][1].get("row_title", "")), fontsize=8, color=QUIET)
        return inline(figure, f"{suite} by length and depth")


def _draw(axes, grid: dict[str, Any]) -> None:
    cells = [[cell if is_number(cell) else float("nan") for cell in row] for row in grid["cells"]]
    axes.pcolormesh(cells, cmap=COLOURS, vmin=0, vmax=1, edgecolors="none")
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            if is_number(cell):
                ink = "#111418" if cell > PALE else "#f2f4f7"
                axes.text(x + 0.5, y + 0.5, f"{100 * cell:.0f}", ha="center", va="center", fontsize=7.5, color=ink)
    axes.set_xticks([x + 0.5 for x in range(len(grid["columns"]))], grid["columns"], rotation=45, ha="right")
    axes.set_yticks([y + 0.5 for y in range(len(grid["rows"]))], grid["rows"])
    axes.set_ylim(len(cells), 0)
    axes.tick_params(labelsize=7.5, length=0)
    axes.spines[:].set_visible(False)
