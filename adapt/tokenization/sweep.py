"""What each further token gains: held-out bytes per token against the number of new tokens, and where it flattens.

The first n tokens of an extension are the extension by n, so one learning serves all."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapt.tokenization.base import Base
from adapt.tokenization.continued_bpe import Learned
from adapt.tokenization.metrics import Fit, fit


@dataclass(frozen=True)
class Point:
    num_tokens: int
    """New tokens."""
    text: str
    fit: Fit
    gain: float | None
    """Bytes per token gained since the point before, for 1,000 further tokens; null at the first."""


def sweep(base: Base, learned: Learned, sizes: Sequence[int], texts: Mapping[str, Sequence[str]]) -> list[Point]:
    """At 0, at each of `sizes` that was reached, and at all tokens learned."""
    total = len(learned.tokens)
    points: list[Point] = []
    for n in sorted({0, total, *(size for size in sizes if size < total)}):
        part = learned.first(n)
        tokenizer = base.grown(part).tokenizer()
        for label, found in texts.items():
            one = fit(tokenizer, found)
            before = next((p for p in reversed(points) if p.text == label), None)
            gain = None
            if before is not None:
                gain = 1000 * (one.bytes_per_token - before.fit.bytes_per_token) / (n - before.num_tokens)
            points.append(Point(n, label, one, gain))
    return points


def table(points: Sequence[Point]) -> Any:
    """A rich table: one line per number of tokens, two columns per text."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    labels = list(dict.fromkeys(p.text for p in points))
    shown = Table(title="Gain of further tokens", title_justify="left", box=SIMPLE, padding=(0, 1))
    shown.add_column("new tokens", justify="right")
    for label in labels:
        shown.add_column(Text(f"{label}, bytes/token"), justify="right")
        shown.add_column("per 1,000", justify="right")
    for n in sorted({p.num_tokens for p in points}):
        cells = [f"{n:,d}"]
        for label in labels:
            (point,) = [p for p in points if p.text == label and p.num_tokens == n]
            cells += [f"{point.fit.bytes_per_token:.3f}", "" if point.gain is None else f"{point.gain:+.3f}"]
        shown.add_row(*cells)
    return shown


def plot(points: Sequence[Point]) -> bytes:
    """PNG: bytes per token against new tokens, one line per text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label in dict.fromkeys(p.text for p in points):
        line = [(p.num_tokens, p.fit.bytes_per_token) for p in points if p.text == label]
        axes.plot(*zip(*line, strict=True), marker="o", label=label)
    axes.set(xlabel="new tokens", ylabel="bytes per token", title="Held-out text")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
