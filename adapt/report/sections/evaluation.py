"""Held-out results before, on the way and after, and how far they moved."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from adapt.components import sections
from adapt.report.data import RunData, is_number, number

BETWEEN = 4
"""Columns between the first and the last evaluation; all of them are in the curves."""
CARDS = 4


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    order: int = 20
    """Place on the page; lower comes first."""
    title: str = "Before and after"
    """Heading."""


@sections.register("evaluation")
def evaluation(config: EvaluationConfig):
    def html(runs: list[RunData]) -> str | None:
        measured = [run for run in runs if run.evaluations]
        if not measured:
            return None
        if len(runs) == 1:
            return _cards(measured[0]) + _table(measured[0]) + _exported(measured[0])
        return _compared(measured)

    return html


def metrics_of(runs: list[RunData]) -> list[str]:
    return list(dict.fromkeys(k for run in runs for line in run.evaluations for k in line if k.startswith("eval/")))


def change(before: float | None, after: float | None) -> str:
    """`-12.3 %`, where that has a meaning."""
    if not (is_number(before) and is_number(after)) or not before:
        return ""
    return f"{100 * (after - before) / abs(before):+.1f} %".replace("-", "−")


def _exported(run: RunData) -> str:
    """The last column is the trained model; a run that interpolates exports another."""
    alpha = run.interpolation.get("alpha")
    if not is_number(alpha) or alpha == 1:
        return ""
    where = '<a href="#forgetting">measured below</a>'
    return f'<p class="quiet">Exported is what lies at α = {alpha:g} between start and end, {where}.</p>'


def _cards(run: RunData) -> str:
    first, last = run.evaluations[0], run.evaluations[-1]
    cards = [
        f'<div class="card"><span>{escape(metric.removeprefix("eval/"))}</span>'
        f"<b>{number(last[metric])}</b><span>{change(first.get(metric), last[metric])} from {number(first.get(metric))}"
        f"</span></div>"
        for metric in metrics_of([run])
        if is_number(last.get(metric)) and is_number(first.get(metric))
    ]
    return f'<div class="cards">{"".join(cards[:CARDS])}</div>' if last is not first and cards else ""


def _table(run: RunData) -> str:
    lines = run.evaluations
    inner = lines[1:-1]
    shown = (
        [inner[round((i + 0.5) * len(inner) / BETWEEN - 0.5)] for i in range(BETWEEN)]
        if len(inner) > BETWEEN
        else inner
    )
    columns = [lines[0], *shown, lines[-1]] if len(lines) > 1 else lines
    heads = [f"step {line['step']:,}" for line in columns] + (["change"] if len(lines) > 1 else [])
    rows = [
        (
            metric,
            [number(c.get(metric)) for c in columns]
            + [change(lines[0].get(metric), lines[-1].get(metric))][: len(lines) - 1],
        )
        for metric in metrics_of([run])
    ]
    return _render(heads, rows)


def _compared(runs: list[RunData]) -> str:
    heads, rows = [], {metric: [] for metric in metrics_of(runs)}
    for run in runs:
        first, last = run.evaluations[0], run.evaluations[-1]
        dot = f'<span class="dot" style="background:{run.colour}"></span>{escape(run.name)}<br>'
        heads += [f"{dot}step {first['step']:,}", f"step {last['step']:,}", "change"]
        for metric, cells in rows.items():
            before, after = first.get(metric), last.get(metric)
            cells += [number(before), number(after), change(before, after)]
    return _render(heads, list(rows.items()))


def _render(heads: list[str], rows: list[tuple[str, list[str]]]) -> str:
    head = "".join(f'<th class="n">{h}</th>' for h in heads)
    body = ""
    for metric, cells in rows:
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        body += f"<tr><td>{escape(metric.removeprefix('eval/'))}</td>{numbers}</tr>"
    return (
        f'<div class="scroll"><table><thead><tr><th>metric</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
