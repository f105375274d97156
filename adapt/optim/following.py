"""Hyperparameters that follow schedules: pure functions of the step, set before each of them, so nothing is to be saved.

A schedule gives a multiplier f(step, total): the learning rate of a group is its peak times f. Any other number of the
groups goes between two values, at_zero where f is 0 and the group's own where f is 1:

    value(step) = at_zero + (own - at_zero) * f(step, total)

Muon's momentum from 0.85 up to 0.95 over 300 steps is `momentum: {schedule: {name: constant, warmup: 300}, at_zero: 0.85}`,
a decay that falls as the learning rate does is `weight_decay: {schedule: "${schedule}"}`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adapt.errors import Problem, UserError, nearest

if TYPE_CHECKING:
    import torch

    from adapt.config.schema import HyperSchedule, Recipe

BETAS = {"beta1": 0, "beta2": 1}
"""Where torch's own optimizers keep them: in `betas`."""
WHERE = "optimizer_schedules"


class Following:
    """Bound to the optimizer of one stage. Raises UserError for a hyperparameter that no group of it has."""

    def __init__(self, optimizer: torch.optim.Optimizer, recipe: Recipe):
        self.optimizer = optimizer
        self.multiplier = recipe.schedule.build()
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.others: list[tuple[str, float, Callable[[int, int], float], dict[int, float]]] = []
        problems = []
        for key, wanted in recipe.optimizer_schedules.items():
            problems += unknown(key, wanted, optimizer.param_groups, recipe.optimizer.name)
            own = {i: value_of(g, key) for i, g in enumerate(optimizer.param_groups) if concerns(wanted, g)}
            followed = {index: value for index, value in own.items() if value}  # what is off (0) stays off
            self.others.append((key, wanted.at_zero, wanted.schedule.build(), followed))
        if problems:
            raise UserError(problems)

    def set(self, step: int, total: int) -> dict[str, float]:
        """The values of the step that follows `step` updates. Returns those of the first group of each, for the log."""
        factor = self.multiplier(step, total)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        shown = {"lr": float(self.optimizer.param_groups[0]["lr"])}
        for key, at_zero, multiplier, followed in self.others:
            factor = multiplier(step, total)
            for index, own in followed.items():  # by number: loading a checkpoint makes new groups
                value = at_zero + (own - at_zero) * factor
                _put(self.optimizer.param_groups[index], key, value)
                shown.setdefault(key, value)
        return shown


def value_of(group: Mapping[str, Any], key: str) -> float | None:
    """A number of a group that may be set between steps; null where it has none of that name. Whole numbers (a rank, a
    count of iterations) decide what the state looks like."""
    value = group["betas"][BETAS[key]] if key in BETAS and "betas" in group else group.get(key)
    return value if isinstance(value, float) else None


def _put(group: dict[str, Any], key: str, value: float) -> None:
    if key in BETAS and "betas" in group:
        group["betas"] = tuple(value if i == BETAS[key] else old for i, old in enumerate(group["betas"]))
    else:
        group[key] = value


def concerns(wanted: HyperSchedule, group: Mapping[str, Any]) -> bool:
    return not wanted.roles or group.get("role") in wanted.roles


def names(groups: list[dict[str, Any]]) -> list[str]:
    """What may follow a schedule."""
    keys = dict.fromkeys(key for group in groups for key in (*group, *(BETAS if "betas" in group else ())))
    return [k for k in keys if k != "lr" and any(value_of(group, k) is not None for group in groups)]


def unknown(key: str, wanted: HyperSchedule, groups: list[dict[str, Any]], optimizer: str) -> Iterator[Problem]:
    """Nothing to follow it, or nothing but zeros."""
    known = names(groups)
    values = [value_of(group, key) for group in groups if concerns(wanted, group)]
    among = f" among the roles {', '.join(wanted.roles)}" if wanted.roles else ""
    if key not in known:
        what = f"no group of {optimizer} has such a number.{nearest(key, known)} It has {', '.join(known)}"
        yield Problem(f"{WHERE}.{key}", what)
    elif not any(values):
        what = f"no group of {optimizer}{among} has one above 0, and what is off stays off; set it in optimizer"
        yield Problem(f"{WHERE}.{key}", what)


def following_problems(recipe: Recipe) -> Iterator[Problem]:
    """What is wrong with the stage's `optimizer_schedules`, without its model."""
    if not recipe.optimizer_schedules:
        return
    groups = _groups_of_a_stand_in(recipe)
    for key, wanted in recipe.optimizer_schedules.items():
        where = f"{WHERE}.{key}"
        if key == "lr":
            yield Problem(where, "the learning rate follows the section `schedule`; write it there")
            continue
        share = key == "momentum" or key.startswith("beta")
        if not (0 <= wanted.at_zero < (1 if share else float("inf"))):
            yield Problem(f"{where}.at_zero", f"{wanted.at_zero} must be {'in [0, 1)' if share else '0 or more'}")
        config = wanted.schedule.config
        for problem in config.problems(recipe) if hasattr(config, "problems") else ():
            yield Problem(f"{where}.{problem.where or 'schedule'}", problem.what)
        if groups is not None:
            yield from unknown(key, wanted, groups, recipe.optimizer.name)


def _groups_of_a_stand_in(recipe: Recipe) -> list[dict[str, Any]] | None:
    """The groups the optimizer would make of a small model with a parameter of every role; null where it cannot be made
    (its own letter says why)."""
    import torch
    from torch import nn

    class StandIn(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(32, 32), nn.LayerNorm(32)
            self.linear, self.lm_head = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

    config = recipe.optimizer.config
    if any(f.name == "groups" for f in dataclasses.fields(config)):  # they are matched against the model's names
        config = dataclasses.replace(config, groups=())
    try:
        with torch.random.fork_rng(devices=[]):
            return dataclasses.replace(recipe.optimizer, config=config).build(StandIn()).param_groups
    except Exception:
        return None
