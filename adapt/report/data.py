"""What a run folder says, read once; anything may be missing in a run that is still going, or was killed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from adapt.config.text import read_yaml

COLOURS = ("#3b78d8", "#e07b39", "#2e9e6b", "#b5519c", "#8a6d3b", "#5b6573", "#17a2b0", "#d2454a", "#8465d1", "#9a9a1f")
"""Readable on white and on black; a run keeps its colour all over the page."""


@dataclass(frozen=True)
class RunData:
    path: Path
    name: str
    """The folder's name; numbered where two compared runs share one."""
    colour: str
    config: str
    """The resolved recipe, YAML."""
    environment: dict[str, Any]
    train: list[dict[str, Any]]
    """Logged steps, in order; of a step made twice (a rewind, a resume) the last."""
    evaluations: list[dict[str, Any]]
    """Lines with `eval/<metric>` keys."""
    optimizer_state_bytes: int | None
    """What the optimizer kept, over all ranks; of several stages the most."""
    grids: list[dict[str, Any]]
    """Tables of suites: `step`, and what `adapt.evaluate.grid.Grid` has; of a step evaluated twice the last."""
    samples: list[dict[str, Any]]
    manifest: dict[str, Any]
    interpolation: dict[str, Any]
    """The sweep between start and end: `points` of alpha and results, the `alpha` taken, `why`, `drift` per layer."""

    @cached_property
    def recipe(self) -> dict[str, Any]:
        try:
            found = read_yaml(self.config)
        except yaml.YAMLError:
            return {}
        return found if isinstance(found, dict) else {}

    def setting(self, dotted: str) -> Any:
        value: Any = self.recipe
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def points(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a logged number, wherever it is finite."""
        lines = self.evaluations if key.startswith("eval/") else self.train
        return [(line["step"], line[key]) for line in lines if is_number(line.get(key))]


def read(path: Path, name: str, colour: str) -> RunData:
    lines = [x for x in map(_json, _text(path / "metrics.jsonl").splitlines()) if _is_line(x)]
    samples, manifest = _json(_text(path / "samples.json")), _json(_text(path / "data.json"))
    between = _json(_text(path / "interpolation.json"))
    environment = _json(_text(path / "environment.json"))
    kept = [x["optimizer_state_bytes"] for x in lines if is_number(x.get("optimizer_state_bytes"))]
    tables = [x for x in map(_json, _text(path / "grids.jsonl").splitlines()) if _is_line(x)]
    return RunData(
        path=path,
        name=name,
        colour=colour,
        config=_text(path / "config.yaml"),
        environment=environment if isinstance(environment, dict) else {},
        train=_last_of_each([x for x in lines if "loss" in x]),
        evaluations=_last_of_each([x for x in lines if any(k.startswith("eval/") for k in x)]),
        optimizer_state_bytes=max(kept, default=None),
        grids=list({(x["step"], str(x.get("suite")), str(x.get("model", ""))): x for x in tables}.values()),
        samples=[x for x in samples if isinstance(x, dict)] if isinstance(samples, list) else [],
        manifest=manifest if isinstance(manifest, dict) else {},
        interpolation=between if isinstance(between, dict) else {},
    )


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> str:
    """For tables: four digits that matter, thousands apart."""
    if not is_number(value):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:#.4g}"


def _last_of_each(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_step = {line["step"]: line for line in lines}
    return [by_step[step] for step in sorted(by_step)]


def _is_line(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("step"), int)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(text: str) -> Any:
    """What a killed process left half written counts as not there."""
    try:
        return json.loads(text)
    except ValueError:
        return None
