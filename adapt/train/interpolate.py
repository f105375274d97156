"""Between what a run started from and what it ended with: theta(alpha) = theta_0 + alpha (theta_1 - theta_0).

Forgetting often falls faster than the gain when alpha goes down from 1 (as in merging a chat model with its
continued pretraining). The sweep measures every alpha with the run's own suites; one of them is exported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapt.config.schema import Interpolation
from adapt.distributed import checkpoint
from adapt.distributed.world import World
from adapt.errors import Problem, UserError
from adapt.runfolder import RunFolder

START = "start"
"""Name of the checkpoint (weights alone) of theta_0."""
FILE = "interpolation.json"


@dataclass(frozen=True)
class Point:
    alpha: float
    results: dict[str, float]


@dataclass(frozen=True)
class Sweep:
    of: str
    """Name of the checkpoint that theta_1 is."""
    alpha: float
    """The one taken."""
    why: str
    points: list[Point]
    drift: dict[str, float]
    """Layer -> ||theta_1 - theta_0|| / ||theta_0||."""

    @property
    def results(self) -> dict[str, float]:
        """Of the alpha taken."""
        return taken(asdict(self))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Ends:
    """theta_0 and theta_1 of this rank's shards, on the CPU; `set(alpha)` writes between them into the model."""

    def __init__(self, root: nn.Module, start: Path):
        """theta_1 is what `root` holds; theta_0 is read from the checkpoint `start`. Collective."""
        self.parameters = dict(root.named_parameters())  # a tied one appears once, so it stays tied
        self.last = {name: _local(p).detach().cpu().clone() for name, p in self.parameters.items()}
        checkpoint.load(start, root, None)
        self.first = {name: _local(p).detach().cpu().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def set(self, alpha: float) -> None:
        for name, parameter in self.parameters.items():
            _local(parameter).copy_(between(self.first[name], self.last[name], alpha))

    def drift(self, world: World) -> dict[str, float]:
        """Collective."""
        moved: dict[str, float] = {}
        size: dict[str, float] = {}
        for name, first in self.first.items():
            layer = layer_of(name)
            moved[layer] = moved.get(layer, 0.0) + float((self.last[name].double() - first.double()).square().sum())
            size[layer] = size.get(layer, 0.0) + float(first.double().square().sum())
        sums = world.sum([*moved.values(), *size.values()])
        moved_sums, sizes = sums[: len(moved)], sums[len(moved) :]
        return {n: math.sqrt(m / s) if s else 0.0 for n, m, s in zip(moved, moved_sums, sizes, strict=True)}


def keep_start(folder: RunFolder, step: int, root: nn.Module, world: World) -> None:
    """Save theta_0 before the first step; raises UserError where a run that went on without it wants it now."""
    if step == 0:
        checkpoint.save(folder.checkpoints, 0, root, None, {}, world, START, folder.attempt)
    elif not (folder.checkpoints / START).is_dir():
        raise UserError(
            Problem(
                "export.interpolation",
                f"this run did not keep its start ({folder.checkpoints / START}), so there is nothing to go back to; leave "
                "the section out, or start a new run with it",
            )
        )


def between(first: Tensor, last: Tensor, alpha: float) -> Tensor:
    """Exactly `first` at 0 and `last` at 1; computed in fp32 or wider."""
    if alpha in (0, 1):
        return last if alpha else first
    dtype = torch.promote_types(first.dtype, torch.float32)
    return torch.lerp(first.to(dtype), last.to(dtype), alpha).to(first.dtype)


def sweep(
    root: nn.Module,
    checkpoints: Path,
    of: str,
    wanted: Interpolation,
    measure: Callable[[], dict[str, float]],
    known: Mapping[float, dict[str, float]],
    world: World,
) -> Sweep:
    """Measure every alpha, choose, and leave the chosen weights in `root`. `known`: what was measured of the two ends in
    the course of the run. Collective."""
    ends = Ends(root, checkpoints / START)
    points = []
    for alpha in alphas(wanted):
        ends.set(alpha)
        points.append(Point(alpha, dict(known[alpha]) if alpha in known else measure()))
    alpha, why = choose(points, wanted)
    ends.set(alpha)
    return Sweep(of, alpha, why, points, ends.drift(world))


def alphas(wanted: Interpolation) -> list[float]:
    return sorted({*wanted.alphas, *([] if wanted.alpha is None else [wanted.alpha])})


def choose(points: list[Point], wanted: Interpolation) -> tuple[float, str]:
    """The alpha and the reason. Where no point keeps the limits, the one that exceeds them least, and it is said so."""
    if wanted.alpha is not None:
        return wanted.alpha, "export.interpolation.alpha"

    def excess(point: Point) -> float:
        over = [_number(point.results.get(b.metric)) - b.at_most for b in wanted.limits]
        return sum(max(0.0, x) for x in over)

    limits = ", ".join(f"{bound.metric} at most {bound.at_most:g}" for bound in wanted.limits)
    kept = [point for point in points if excess(point) == 0]
    if not kept:
        point = min(points, key=lambda p: (excess(p), p.alpha))
        return point.alpha, f"no alpha keeps {limits}; this one exceeds it least"
    point = min(kept, key=lambda p: (_number(p.results.get(wanted.minimise)), p.alpha))
    return point.alpha, f"lowest {wanted.minimise}" + (f" with {limits}" if limits else "")


def taken(found: Mapping[str, Any]) -> dict[str, float]:
    """Results of the alpha taken, from a sweep as it is kept in the run folder."""
    return next(point["results"] for point in found["points"] if point["alpha"] == found["alpha"])


def redo(
    folder: RunFolder, wanted: Interpolation | None, saved: Path, found: Mapping[str, Any], root: nn.Module
) -> str:
    """For a later export: put `root`, which holds the checkpoint `saved`, where the sweep (`found`) put it. Returns
    what was done, in words ("" where the run has no interpolation)."""
    if wanted is None:
        return ""
    if found.get("of") != saved.name or not (folder.checkpoints / START).is_dir():
        return f"{saved.name} as it is (alpha 1): the run made no sweep of it"
    Ends(root, folder.checkpoints / START).set(found["alpha"])
    return describe(found["alpha"], found["why"])


def describe(alpha: float, why: str) -> str:
    return f"theta_0 + {alpha:g} (theta_1 - theta_0): {why}"


def table(found: Sweep) -> Any:
    """A row per alpha, a column per metric."""
    from rich.table import Table

    metrics = list(dict.fromkeys(m for point in found.points for m in point.results))
    shown = Table(title="between start (alpha 0) and end (1)", title_justify="left")
    shown.add_column("metric", overflow="fold")
    for point in found.points:
        taken = point.alpha == found.alpha
        shown.add_column(f"{'> ' if taken else ''}{point.alpha:g}", justify="right", no_wrap=True)
    for metric in metrics:
        shown.add_row(metric, *(f"{point.results.get(metric, math.nan):.4g}" for point in found.points))
    return shown


def layer_of(name: str) -> str:
    """`student.model.layers.3.mlp.up_proj.weight` -> `layer 3`; what stands outside of layers by its own name."""
    if inside := re.search(r"\.layers\.(\d+)\.", name):
        return f"layer {inside[1]}"
    return name.removeprefix("student.").removeprefix("model.").removesuffix(".weight")


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _number(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value
