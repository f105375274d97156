"""Figures for the page: plain axes, readable on white and on black, no reference to the outside."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import Any

QUIET = "#7d8795"


def drawing(draw: Callable[[Any], None], label: str, size: tuple[float, float] = (4.2, 2.4)) -> str:
    """The SVG of `draw(axes)`; `label` is read out where the picture cannot be seen."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "text.parse_math": False}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(QUIET)
        axes.tick_params(labelsize=8, length=0)
        axes.xaxis.label.set_size(8)
        axes.yaxis.label.set_size(8)
        axes.grid(axis="y", color=QUIET, alpha=0.25, linewidth=0.6)
        out = io.StringIO()
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns:xlink|xmlns)="[^"]*"', "", text).replace("xlink:href", "href")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
