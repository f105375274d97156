"""How often the run was begun, where, and what ended each attempt."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from adapt.attempts import history
from adapt.components import sections
from adapt.report.data import RunData
from adapt.report.sections.forgetting import table


@dataclass(frozen=True, kw_only=True)
class AttemptsConfig:
    order: int = 90
    """Place on the page; lower comes first."""
    title: str = "Attempts"
    """Heading."""


HEADS = ["attempt", "began", "ended", "where", "steps", "how it ended"]


@sections.register("attempts")
def attempts(config: AttemptsConfig):
    def html(runs: list[RunData]) -> str | None:
        parts = []
        for run in runs:
            made = history(run.path)
            if len(made) > 1:
                name = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
                parts.append(name + table(HEADS, [_row(attempt) for attempt in made], 1))
        return "".join(parts) or None

    return html


def _row(attempt: dict[str, Any]) -> list[str]:
    job, restarts = attempt.get("slurm_job"), attempt.get("slurm_restarts")
    where = [str(attempt.get("nodes") or attempt.get("host", ""))]
    where += [f"SLURM job {job}" + (f", restart {restarts}" if restarts else "")] if job else []
    first, last = attempt.get("from_step"), attempt.get("step")
    steps = "" if first is None or last is None else f"{first:,} to {last:,}"
    how = f"{attempt.get('reason', '')} (exit {attempt.get('code')})" if attempt.get("ended") else "killed, or lost"
    cells = [attempt["generation"], attempt.get("began", ""), attempt.get("ended", ""), ", ".join(where), steps, how]
    return [escape(str(cell)) for cell in cells]
