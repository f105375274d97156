"""What each part of a converted model is worth: how much worse it is without."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from adapt.components import sections
from adapt.report.data import RunData, is_number, number
from adapt.report.drawing import QUIET, drawing

PREFIX = "eval/ablation/"
WORDS = {
    "recurrent": "without recurrent layers",
    "attention": "without attention layers",
    "convolutions": "without convolutions",
    "decays": "without decays",
}


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    order: int = 43
    """Place on the page; lower comes first."""
    title: str = "Without its parts"
    """Heading."""


@sections.register("ablation")
def ablation(config: AblationConfig):
    def html(runs: list[RunData]) -> str | None:
        parts = [_of(run, len(runs) > 1) for run in runs if found(run)]
        return "".join(parts) or None

    return html


def found(run: RunData) -> dict[str, dict[str, float]]:
    """Measure -> {part: value} of the last evaluation that took parts out; only measures of the whole model."""
    line = next((x for x in reversed(run.evaluations) if any(k.startswith(PREFIX) for k in x)), {})
    table: dict[str, dict[str, float]] = {}
    for key, value in line.items():
        part, _, measure = key.removeprefix(PREFIX).partition("/")
        if key.startswith(PREFIX) and is_number(value):
            table.setdefault(measure, {})[part] = value
    return {measure: values for measure, values in table.items() if "whole" in values}


def _of(run: RunData, many: bool) -> str:
    table = found(run)
    parts = dict.fromkeys(part for values in table.values() for part in values)
    head = "".join(f'<th class="n">{escape(measure)}</th><th class="n">more</th>' for measure in table)
    body = ""
    for part in parts:
        cells = ""
        for values in table.values():
            value = values.get(part)
            more = "" if value is None or part == "whole" else f"{value - values['whole']:+.3f}".replace("-", "−")
            cells += f'<td class="n">{number(value)}</td><td class="n">{more}</td>'
        body += f"<tr><td>{escape(WORDS.get(part, part))}</td>{cells}</tr>"
    title = f"<h3>{escape(run.name)}</h3>" if many else ""
    rows = f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    plots = "".join(
        f"<figure><figcaption>{escape(measure)}, more without</figcaption>{_bars(run, measure, values)}</figure>"
        for measure, values in table.items()
        if len(values) > 1
    )
    return f'{title}{rows}<div class="plots">{plots}</div>'


def _bars(run: RunData, measure: str, values: dict[str, float]) -> str:
    parts = [part for part in values if part != "whole"]

    def draw(axes: Any) -> None:
        more = [values[part] - values["whole"] for part in parts]
        axes.barh(range(len(parts)), more, color=run.colour, height=0.6)
        axes.set_yticks(range(len(parts)), parts)
        axes.set_ylim(len(parts) - 0.5, -0.5)
        axes.axvline(0, color=QUIET, linewidth=0.8)

    return drawing(draw, f"{measure} without each part", (4.2, 0.35 * len(parts) + 0.6))
