"""What the optimizer keeps and sends, by the footprint that each algorithm states of itself."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from adapt.config.schema import Recipe
from adapt.plan.cluster import Grid
from adapt.plan.model import PlannedModel
from adapt.plan.shapes import Weight


@dataclass(frozen=True)
class OptimizerPlan:
    state: int
    """Bytes of the first rank, which has most."""
    sent: float
    """Bytes that a rank sends in a step, on average."""
    step_buffers: int
    """Bytes that a step holds beside its state: what is whole or stacked at one time."""
    flops: float
    """Of Newton-Schulz iterations, over all ranks."""
    known: bool
    """Whether the optimizer says what it keeps; a user's own may not."""


CHUNK_BUFFERS = 8
"""Copies of a chunk that a matrix algorithm holds at once: gradients, momenta, what they are divided into, sent, received."""


def plan_optimizer(recipe: Recipe, model: PlannedModel, grid: Grid, moved: int) -> OptimizerPlan:
    """`moved`: bytes of an element that Newton-Schulz computes with."""
    config = recipe.optimizer.config
    if not hasattr(config, "algorithms"):
        return OptimizerPlan(0, 0.0, 0, 0.0, False)
    from adapt.optim.algorithms import Shard, named
    from adapt.optim.newton_schulz import flops as newton_schulz_flops

    state, sent, chunk, stacked, flops = 0, 0.0, 0, 0, 0.0
    for weight, group, is_matrix in _routed(config, model):
        held = Shard(weight.shape, model.bytes_each(weight), grid.shards, grid.replicas)
        found = named(group["algorithm"]).footprint(held, group, moved)
        state, sent, chunk = state + found.state, sent + found.sent, max(chunk, found.chunk)
        if is_matrix:
            stacked += 4 * held.local
            flops += newton_schulz_flops(*weight.shape, group["ns_steps"]) if "ns_steps" in group else 0
    return OptimizerPlan(state, sent, CHUNK_BUFFERS * min(chunk, stacked), flops, True)


def _routed(config: Any, model: PlannedModel) -> Iterator[tuple[Weight, dict[str, Any], bool]]:
    """As adapt.optim.routing routes modules: patterns before roles."""
    rest, matrix = config.algorithms()
    for weight in model.weights:
        if weight.name not in model.trained:
            continue
        claims = [g for g in config.groups if fnmatch.fnmatch(weight.name, g.match)]
        role = claims[0].role or weight.role if claims else weight.role
        if role != "matrix" or matrix is None:
            yield weight, rest, False
        else:
            yield weight, matrix | {"transposed": bool(claims and claims[0].transposed)}, True
