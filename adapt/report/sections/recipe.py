"""The resolved recipe: what to write to get this run again."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from adapt.components import sections
from adapt.report.data import RunData


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    order: int = 60
    """Place on the page; lower comes first."""
    title: str = "Recipe"
    """Heading."""


@sections.register("recipe")
def recipe(config: RecipeConfig):
    def html(runs: list[RunData]) -> str:
        return "".join(
            f"<details><summary>config.yaml of {escape(run.name)}</summary><pre>{escape(run.config)}</pre></details>"
            for run in runs
            if run.config
        )

    return html
