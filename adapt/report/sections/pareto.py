"""Compared runs as points: what each gained on the domain against what it forgot, and which of them no other beats."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from adapt.components import sections
from adapt.report.data import RunData, is_number, number
from adapt.report.drawing import QUIET, drawing
from adapt.report.forgetting import Outcome, front, outcome, replay_fraction, sweep
from adapt.report.sections.forgetting import signed, table


@dataclass(frozen=True, kw_only=True)
class ParetoConfig:
    order: int = 22
    """Place on the page; lower comes first."""
    title: str = "Gain against forgetting"
    """Heading."""


@sections.register("pareto")
def pareto(config: ParetoConfig):
    def html(runs: list[RunData]) -> str | None:
        found = [(run, result) for run in runs if (result := outcome(run))]
        if len(found) < 2:
            return None
        best = front([result for _, result in found])
        svg = drawing(lambda axes: _draw(axes, found, best), "adaptation gain against worst forgetting", (7.2, 4.0))
        return f'<div class="wide">{svg}</div>{LEGEND}{_table(found, best)}'

    return html


LEGEND = (
    '<p class="quiet">Bits per byte, at the last evaluation. Right is better, low is better; the line joins the runs '
    "that no other beats in both. A thin line is a run's interpolation from its start (the origin) to its end.</p>"
)


def _draw(axes: Any, found: list[tuple[RunData, Outcome]], best: list[bool]) -> None:
    axes.axhline(0, color=QUIET, linewidth=0.8)
    ends = sorted((r.gain, r.forgetting) for (_, r), good in zip(found, best, strict=True) if good)
    axes.plot(*zip(*ends, strict=True), color=QUIET, linewidth=1.2, drawstyle="steps-post", zorder=1)
    places = sorted(range(len(found)), key=lambda i: (found[i][1].forgetting, i))
    for (run, result), good, place in zip(found, best, map(places.index, range(len(found))), strict=True):
        path = [(r.gain, r.forgetting) for _, r in sweep(run)]
        if path:
            axes.plot(*zip(*path, strict=True), color=run.colour, linewidth=0.9, marker=".", markersize=4, alpha=0.6)
        face = run.colour if good else "none"
        axes.scatter(
            result.gain, result.forgetting, s=46, facecolor=face, edgecolor=run.colour, linewidth=1.6, zorder=3
        )
        text = f"lr {rate(run)}, replay {replay_fraction(run):.0%}"
        axes.annotate(
            text,
            (result.gain, result.forgetting),
            (7, 6 if place % 2 else -13),
            textcoords="offset points",
            fontsize=8,
            color=QUIET,
        )
    axes.margins(0.12)
    axes.set_xlabel("adaptation gain G", color=QUIET)
    axes.set_ylabel("worst forgetting F", color=QUIET)


def _table(found: list[tuple[RunData, Outcome]], best: list[bool]) -> str:
    rows = []
    for (run, result), good in sorted(zip(found, best, strict=True), key=lambda x: -x[0][1].gain):
        dot = f'<span class="dot" style="background:{run.colour}"></span>'
        values = [signed(result.gain), signed(result.forgetting), number(result.efficiency), "front" if good else ""]
        rows.append([dot + escape(run.name), rate(run), f"{replay_fraction(run):.0%}", *values])
    return table(["run", "lr", "replay", "gain G", "worst forgetting F", "G / F", "Pareto"], rows, 1)


def rate(run: RunData) -> str:
    rate = run.setting("optimizer.lr")
    return f"{rate:.0e}".replace("e-0", "e-") if is_number(rate) else "?"
