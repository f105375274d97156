"""How well tokens are predicted by how much stands before them: before, after, and beside other models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from typing import Any

from adapt.components import sections
from adapt.report.data import COLOURS, RunData, is_number
from adapt.report.drawing import QUIET, drawing
from adapt.report.sections.heatmaps import whole

UNIT = "nats per token"
"""Of grids that are drawn here."""
STYLES = (("--", 1.3), (":", 1.3), ("-", 1.6))
"""Of the models compared with, of the start, of the end."""


@dataclass(frozen=True, kw_only=True)
class PositionsConfig:
    order: int = 26
    """Place on the page; lower comes first."""
    title: str = "Predicted, by the tokens before"
    """Heading."""


@sections.register("positions")
def positions(config: PositionsConfig):
    def html(runs: list[RunData]) -> str | None:
        plots = [
            f"<figure><figcaption>{escape(run.name) + ': ' if len(runs) > 1 else ''}{escape(label)}, {UNIT}</figcaption>"
            f"{_plot(run, label)}</figure>"
            for run in runs
            for label in dict.fromkeys(label for grid in _grids(run) for label in grid["rows"])
        ]
        return f'<div class="plots">{"".join(plots)}</div>' if plots else None

    return html


def _grids(run: RunData) -> list[dict[str, Any]]:
    return [grid for grid in run.grids if whole(grid) and grid.get("unit") == UNIT]


def curves(run: RunData, label: str) -> list[tuple[str, tuple[str, float], list[tuple[float, float]]]]:
    """(name, style, (middle of the part, value)) of the last of each other model, and of the student's first and last."""
    by_model: dict[str, list[dict[str, Any]]] = {}
    for grid in _grids(run):
        if label in grid["rows"]:
            by_model.setdefault(str(grid.get("model") or ""), []).append(grid)
    own = by_model.pop("", [])
    shown = [(model, STYLES[0], grids[-1]) for model, grids in by_model.items()]
    shown += [(f"step {own[0]['step']:,}", STYLES[1], own[0])] if len(own) > 1 else []
    shown += [(f"step {own[-1]['step']:,}", STYLES[2], own[-1])] if own else []
    return [(name, style, _points(grid, label)) for name, style, grid in shown]


def _points(grid: dict[str, Any], label: str) -> list[tuple[float, float]]:
    cells = grid["cells"][grid["rows"].index(label)]
    parts = [re.fullmatch(r"(\d+)-(\d+)", str(name)) for name in grid["columns"]]
    return [
        ((int(part[1]) + int(part[2])) / 2, cell)
        for part, cell in zip(parts, cells, strict=True)
        if part and is_number(cell)
    ]


def _plot(run: RunData, label: str) -> str:
    trained = run.setting("data.seq_len")

    def draw(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        for number, (name, (dash, width), points) in enumerate(curves(run, label)):
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=COLOURS[number % len(COLOURS)],
                    linestyle=dash,
                    linewidth=width,
                    marker="o",
                    markersize=3,
                    label=name,
                )
        if is_number(trained) and axes.dataLim.xmin < trained < axes.dataLim.xmax:
            axes.axvline(trained, color=QUIET, linewidth=0.8, linestyle=":")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("tokens before (dotted: row length of the training)", color=QUIET)
        axes.legend(fontsize=7, frameon=False, labelcolor=QUIET)

    return drawing(draw, f"{UNIT} of {label} by the tokens before", (4.6, 2.8))
