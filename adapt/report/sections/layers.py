"""Layers that learn from the attention they replace: how far each is from it, and how far back it looks, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from adapt.components import sections
from adapt.report.data import RunData
from adapt.report.figure import QUIET, inline

SHOWN = {
    "relative_error": "relative error of the heads, |student - teacher|² / |teacher|²",
    "log2_half_life": "half-life of the state, log2 of tokens (mean over heads and channels)",
}

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
        return f'<div class="plots">{"".join(plots)}</div>' if plots else None

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
