"""Layers that learn from the attention they replace: how far each is from it, and how far back it looks, step by step;
how its half-lives are spread, before and after."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from adapt.components import sections
from adapt.report.data import RunData, is_number
from adapt.report.figure import QUIET, inline
from adapt.report.sections.heatmaps import whole

SHOWN = {
    "relative_error": "relative error of the token mixer, |student - teacher|² / |teacher|²",
    "log2_half_life": "half-life of the state, log2 of tokens (mean over heads and channels)",
}

SPREAD = "% of channels"
"""Unit of grids of half-lives."""
COLUMNS = 60
"""Steps that are drawn at most."""


@dataclass(frozen=True, kw_only=True)
class LayersConfig:
    order: int = 42
    """Place on the page; lower comes first."""
    title: str = "Layers that learn from attention"
    """Heading."""


@sections.register("layers")
def layers(config: LayersConfig):
    def html(runs: list[RunData]) -> str | None:
        plots = [
            f"<figure><figcaption>{escape(run.name)}: {escape(words)}</figcaption>{_plot(run, term, names)}</figure>"
            for run in runs
            for term, words in SHOWN.items()
            if (names := _layers(run, term))
        ]
        wide = [
            f"<figure><figcaption>{escape(run.name)}: half-lives of each layer, % of channels and tokens</figcaption>"
            f"{_spread(grids)}</figure>"
            for run in runs
            if (grids := [grid for grid in run.grids if whole(grid) and grid.get("unit") == SPREAD])
        ]
        html = f'<div class="plots">{"".join(plots)}</div>' if plots else ""
        return html + (f'<div class="plots grids">{"".join(wide)}</div>' if wide else "") or None

    return html


def _layers(run: RunData, term: str) -> list[str]:
    prefix = f"loss/{term}/"
    return sorted({key.removeprefix(prefix) for line in run.train for key in line if key.startswith(prefix)})


def _plot(run: RunData, term: str, names: list[str]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    lines = [line for line in run.train if f"loss/{term}/{names[0]}" in line]
    lines = lines[:: -(-len(lines) // COLUMNS)]
    cells = [[line.get(f"loss/{term}/{name}") for line in lines] for name in names]
    cells = [[float("nan") if value is None else value for value in row] for row in cells]
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(5.2, 0.16 * len(names) + 1.2), layout="constrained")
        axes = figure.subplots()
        drawn = axes.pcolormesh(cells, cmap="cividis", edgecolors="none")
        axes.set_ylim(len(names), 0)
        bar = figure.colorbar(drawn, ax=axes)
        bar.ax.tick_params(labelsize=8, length=0)
        bar.outline.set_visible(False)
        bar.solids.set_rasterized(False)  # no picture inside the drawing: the page refers to nothing
        every = max(1, len(names) // 8)
        axes.set_yticks([i + 0.5 for i in range(0, len(names), every)], names[::every])
        at = sorted({0, len(lines) // 2, len(lines) - 1})
        axes.set_xticks([i + 0.5 for i in at], [lines[i]["step"] for i in at])
        axes.set_xlabel("step", fontsize=8, color=QUIET)
        axes.set_ylabel("layer", fontsize=8, color=QUIET)
        axes.tick_params(labelsize=8, length=0)
        axes.spines[:].set_visible(False)
        return inline(figure, f"{term} by layer and step")


def _spread(grids: list[dict[str, Any]]) -> str:
    """The first and the last, side by side."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = [grids[0], grids[-1]] if len(grids) > 1 else grids
    most = 100 * max((c for grid in shown for row in grid["cells"] for c in row if is_number(c)), default=0.01)
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(9.6, 0.17 * len(shown[-1]["rows"]) + 1.3), layout="constrained")
        for axes, grid in zip(figure.subplots(1, 2, squeeze=False)[0], shown, strict=False):
            rows, columns = grid["rows"], grid["columns"]
            cells = [[100 * cell if is_number(cell) else float("nan") for cell in row] for row in grid["cells"]]
            drawn = axes.pcolormesh(cells, cmap="cividis", vmin=0, vmax=most, edgecolors="none")
            axes.set_ylim(len(rows), 0)
            axes.set_title(f"step {grid['step']:,}", fontsize=9, color=QUIET)
            axes.set_xticks([i + 0.5 for i in range(len(columns))], columns, rotation=45, ha="right")
            every = max(1, len(rows) // 8)
            axes.set_yticks([i + 0.5 for i in range(0, len(rows), every)], rows[::every])
            axes.set_xlabel(str(grid.get("column_title", "")), fontsize=8, color=QUIET)
            axes.set_ylabel(str(grid.get("row_title", "")), fontsize=8, color=QUIET)
            axes.tick_params(labelsize=7.5, length=0)
            axes.spines[:].set_visible(False)
            bar = figure.colorbar(drawn, ax=axes)
            bar.ax.tick_params(labelsize=8, length=0)
            bar.outline.set_visible(False)
            bar.solids.set_rasterized(False)
        for axes in figure.axes[:2][len(shown) :]:
            axes.set_visible(False)
        return inline(figure, "half-lives by layer")
