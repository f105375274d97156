"""What was done, on what, for how long."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from statistics import median
from typing import Any

from adapt.components import sections
from adapt.report.data import RunData


@dataclass(frozen=True, kw_only=True)
class SummaryConfig:
    order: int = 10
    """Place on the page; lower comes first."""
    title: str = "What was done"
    """Heading."""


@sections.register("summary")
def summary(config: SummaryConfig):
    def html(runs: list[RunData]) -> str:
        rows = [_facts(run) for run in runs]
        keys = dict.fromkeys(key for row in rows for key in row)
        lines = ""
        for key in keys:
            cells = "".join(f"<td>{escape(str(row.get(key, '')))}</td>" for row in rows)
            lines += f"<tr><th>{key}</th>{cells}</tr>"
        names = "".join(
            f'<th><span class="dot" style="background:{run.colour}"></span>{escape(run.name)}</th>' for run in runs
        )
        head = f"<thead><tr><th></th>{names}</tr></thead>" if len(runs) > 1 else ""
        return f'<div class="scroll"><table class="facts">{head}<tbody>{lines}</tbody></table></div>'

    return html


def _facts(run: RunData) -> dict[str, Any]:
    last = run.train[-1] if run.train else {}
    speeds = [x["tokens_per_s"] for x in run.train if x.get("tokens_per_s")]
    conversions = [_name(c) for c in run.setting("model.conversions") or []]
    stages = [_name(s) for s in run.recipe.get("stages") or []]
    data = [_name(d) for d in run.setting("data.train") or []]
    versions = run.environment.get("versions") or {}
    commit = (run.environment.get("git") or {}).get("commit") or ""
    facts = {
        "base model": run.setting("model.base"),
        "conversions": ", ".join(conversions),
        "stages": ", ".join(stages),
        "objective": _name(run.setting("objective")),
        "optimizer": ", ".join(f"{k} {v}" if k != "name" else v for k, v in _short(run.setting("optimizer")).items()),
        "training data": ", ".join(data),
        "steps": f"{last['step']:,}" if last else "",
        "tokens": f"{last['tokens']:,}" if last.get("tokens") else "",
        "speed": f"{median(speeds):,.0f} tokens/s (median)" if speeds else "",
        "hardware": _hardware(run.environment),
        "versions": ", ".join(
            f"{k} {v}" for k, v in versions.items() if v and k in ("adapt-lm", "torch", "transformers")
        )
        + (f", commit {commit[:10]}" if commit else ""),
        "started": run.environment.get("started"),
        "command": run.environment.get("command"),
    }
    return {key: value for key, value in facts.items() if value}


def _name(choice: Any) -> str:
    """Of a component, a dataset or a stage, in whatever form the recipe has it."""
    if isinstance(choice, dict):
        return str(choice.get("name") or _name(choice.get("source")) or "")
    return str(choice or "")


def _short(optimizer: Any) -> dict[str, Any]:
    optimizer = optimizer if isinstance(optimizer, dict) else {"name": str(optimizer or "")}
    return {k: optimizer[k] for k in ("name", "lr") if k in optimizer}


def _hardware(environment: dict[str, Any]) -> str:
    machine = environment.get("hardware") or {}
    gpus = machine.get("gpus") or []
    where = f"{len(gpus)} x {gpus[0]}" if gpus else f"{machine['cores']} cores of {machine['cpu']}" if machine else ""
    world = environment.get("world_size", 1)
    return f"{where}, {world} processes" if where and world > 1 else where
