"""Texts as each sampler wrote them; the colour of a token says when it was revealed."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from adapt.components import sections
from adapt.report.data import RunData, number

LEGEND = '<p class="quiet">A token\'s colour is the pass that revealed it: first<span class="scale"></span>last.</p>'


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    order: int = 30
    """Place on the page; lower comes first."""
    title: str = "Samples"
    """Heading."""


@sections.register("samples")
def samples(config: SamplesConfig):
    def html(runs: list[RunData]) -> str | None:
        parts = [_sample(run, item, len(runs) > 1) for run in runs for item in run.samples]
        return "".join([LEGEND, *parts]) if parts else None

    return html


def _sample(run: RunData, item: dict[str, Any], many: bool) -> str:
    facts = [run.name] if many else []
    facts += [
        str(item.get("sampler", "")),
        *(f"{number(item.get(k))} {w}" for k, w in FIGURES.items() if number(item.get(k))),
    ]
    style = f' style="border-color:{run.colour}"' if many else ""
    heading = f'<p class="quiet">{escape(" · ".join(f for f in facts if f))}</p>'
    prompt = f'<span class="prompt">{escape(str(item.get("prompt", "")))}</span>'
    return f'<div class="sample"{style}>{heading}<div class="text">{prompt}{_tokens(item)}</div></div>'


FIGURES = {"forwards": "passes", "tokens_per_forward": "tokens per pass"}


def _tokens(item: dict[str, Any]) -> str:
    reveal = [(str(text), int(step)) for text, step in item.get("reveal") or []]
    if not reveal:
        return escape(str(item.get("text", "")))
    order = {step: rank for rank, step in enumerate(sorted({step for _, step in reveal}))}
    last = max(1, len(order) - 1)
    return "".join(
        f'<span class="t" title="denoising step {step}" style="--when:{order[step] / last:.3f}">{escape(text)}</span>'
        for text, step in reveal
    )
