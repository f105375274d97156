"""What was gained on the domain and forgotten elsewhere, along the run and between its start and its end."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from adapt.components import sections
from adapt.report.data import COLOURS, RunData, is_number, number
from adapt.report.drawing import QUIET, drawing
from adapt.report.forgetting import EPSILON, Gap, domains, forgetting, gain, guards, outcome

DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True, kw_only=True)
class ForgettingConfig:
    order: int = 25
    """Place on the page; lower comes first."""
    title: str = "Gained and forgotten"
    """Heading."""


@sections.register("forgetting")
def forgetting_section(config: ForgettingConfig):
    def html(runs: list[RunData]) -> str | None:
        swept = [run for run in runs if run.interpolation.get("points")]
        measured = [run for run in runs if run in swept or any(forgetting(run, guard) for guard in guards(run))]
        if not measured:
            return None
        plots = [
            ("forgetting, bits per byte", _curves(measured, guards, forgetting)),
            ("adaptation gain, bits per byte", _curves([r for r in measured if guards(r)], domains, gain)),
        ]
        plots += [(f"drift of each layer, {run.name}", _drift(run)) for run in measured if _layers(run)]
        figures = "".join(f"<figure><figcaption>{escape(t)}</figcaption>{svg}</figure>" for t, svg in plots if svg)
        if figures:
            names = "".join(f"<span>{_name(run, runs)}</span>" for run in measured)
            legend = f'<div class="legend">{names}</div>' if len(runs) > 1 else ""
            figures = f'{legend}<div class="plots">{figures}</div>'
        return f"{figures}{_gaps(measured)}{_outcomes(measured)}{_sweeps(measured)}"

    return html


def _curves(runs: list[RunData], labels, points) -> str:
    """A colour per set where there is one run, else a colour per run and a dash per set."""
    if not any(len(points(run, label)) > 1 for run in runs for label in labels(run)):
        return ""

    def draw(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        axes.axhline(0, color=QUIET, linewidth=0.8)
        for run in runs:
            for index, label in enumerate(labels(run)):
                found = points(run, label)
                if not found:
                    continue
                one = len(runs) == 1
                axes.plot(
                    *zip(*found, strict=True),
                    color=COLOURS[index % len(COLOURS)] if one else run.colour,
                    linestyle="-" if one else DASHES[index % len(DASHES)],
                    linewidth=1.6,
                    marker="o",
                    markersize=3.5,
                    label=label if one or run is runs[0] else None,
                )
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("step", color=QUIET)
        if len(runs) == 1 or any(len(labels(run)) > 1 for run in runs):  # the runs' colours are in the legend above
            axes.legend(fontsize=7, frameon=False, labelcolor=QUIET)

    return drawing(draw, f"{points.__name__} against the step")


def _layers(run: RunData) -> dict[str, float]:
    drift = run.interpolation.get("drift")
    return {k: v for k, v in drift.items() if is_number(v)} if isinstance(drift, dict) else {}


def _drift(run: RunData) -> str:
    layers = _layers(run)

    def draw(axes: Any) -> None:
        axes.bar(range(len(layers)), list(layers.values()), color=run.colour, width=0.7)
        every = max(1, len(layers) // 12)
        places = range(0, len(layers), every)
        axes.set_xticks(list(places), [list(layers)[i].removeprefix("layer ") for i in places], rotation=45, ha="right")
        axes.set_ylabel("‖θ₁ − θ₀‖ / ‖θ₀‖", color=QUIET)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=False)

    return drawing(draw, "relative distance of each layer's weights from the start")


def _gaps(runs: list[RunData]) -> str:
    rows = []
    for run in runs:
        for guard in guards(run):
            if points := forgetting(run, guard):
                gap = Gap.of(points)
                back = "never deep" if gap.depth <= 0 else gap.recovered if gap.recovered is not None else "not yet"
                cells = [signed(gap.final), signed(gap.depth), gap.deepest, back]
                rows.append([_name(run, runs), escape(guard), *map(str, cells)])
    heads = ["guard", "forgetting at the end", "stability gap (max)", "at step", "recovered at step"]
    if not rows:
        return ""
    return table(([""] if len(runs) > 1 else []) + heads, [row if len(runs) > 1 else row[1:] for row in rows], 1)


def _outcomes(runs: list[RunData]) -> str:
    rows = []
    for run in runs:
        if found := outcome(run):
            cells = [signed(found.gain), signed(found.forgetting), number(found.efficiency)]
            rows.append([_name(run, runs), *cells])
    heads = ["run", "adaptation gain G", "worst forgetting F", f"efficiency G / max(F, {EPSILON:g})"]
    return table(heads, rows, 1) if rows else ""


def _sweeps(runs: list[RunData]) -> str:
    parts = []
    for run in runs:
        points = [p for p in run.interpolation.get("points") or [] if isinstance(p, dict)]
        if not points:
            continue
        metrics = list(dict.fromkeys(m for p in points for m in p.get("results") or {}))
        chosen = run.interpolation.get("alpha")
        heads = ["metric", *(f"{'exported: ' if p.get('alpha') == chosen else ''}α {p.get('alpha')}" for p in points)]
        rows = [[escape(m), *(number((p.get("results") or {}).get(m)) for p in points)] for m in metrics]
        why = escape(str(run.interpolation.get("why", "")))
        title = f"<h3>Between start and end{f', {escape(run.name)}' if len(runs) > 1 else ''}</h3>"
        text = f'<p class="quiet">θ₀ + α (θ₁ − θ₀); exported: α = {escape(str(chosen))} ({why})</p>'
        parts.append(title + text + table(heads, rows, 1))
    return "".join(parts)


def table(heads: list[str], rows: list[list[str]], words: int) -> str:
    """Cells are HTML; the first `words` columns are text, the others numbers."""
    head = "".join(f"<th{'' if i < words else CLASS}>{escape(h)}</th>" for i, h in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f"<td{'' if i < words else CLASS}>{c}</td>" for i, c in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


CLASS = ' class="n"'


def signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _name(run: RunData, runs: list[RunData]) -> str:
    dot = f'<span class="dot" style="background:{run.colour}"></span>' if len(runs) > 1 else ""
    return dot + escape(run.name)
