"""Drawings of the page: SVG within the HTML, in the page's colours, with nothing that refers to the outside."""

from __future__ import annotations

import io
import re
from html import escape

QUIET = "#7d8795"


def inline(figure, label: str) -> str:
    """A matplotlib figure as an `<svg>` element; to be called under `rc_context({"svg.fonttype": "none"})`."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns:xlink|xmlns)="[^"]*"', "", svg).replace("xlink:href", "href")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
