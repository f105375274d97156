"""The group syntax that every optimizer shares: a rate and a decay for each role, and for parameters by name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from adapt.errors import Problem

ROLES = ("matrix", "embedding", "head", "norm", "other")
Role = Literal["matrix", "embedding", "head", "norm", "other"]

TYPICAL = 0.02
"""Size of a weight of a pretrained model (most are initialised with this standard deviation)."""
LOST_IN_BF16 = TYPICAL * 2**-9
"""bfloat16 has 8 bits of precision: a relative step below half of the last one is rounded away."""


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    lr: float | None = None
    """Peak learning rate of these parameters, itself and not a factor; null: what the optimizer's own keys give."""
    weight_decay: float | None = None
    """Decoupled decay of these parameters; null: the optimizer's, and none for vectors and spared embeddings."""


@dataclass(frozen=True, kw_only=True)
class PatternConfig(GroupConfig):
    match: str
    """Parameters by name, with * and ?: `*.q_proj.weight`. One that matches nothing is an error."""
    role: Role | None = None
    """Treat them as this role, e.g. `other` to keep a matrix with AdamW; null: the role they have."""
    split: tuple[int, ...] = ()
    """Rows of the matrices that a fused weight holds one below the other: each is a matrix of its own."""
    transposed: bool = False
    """The weight is stored as [in, out] (Conv1D of transformers), so that its rows are inputs."""


@dataclass(frozen=True, kw_only=True)
class GroupedConfig:
    lr: float = 1e-5
    """Peak learning rate; the schedule multiplies it, and every group's own."""
    weight_decay: float = 0.0
    """Decoupled decay of parameters with two or more dimensions; 0 is usual when little data meets a trained model."""
    decay_embeddings: bool = False
    """Decay embeddings too (and a head tied to them): rows of tokens the data lacks then shrink towards nothing."""
    matrix: GroupConfig = GroupConfig()
    """Weights of linear layers, of 16 rows and columns or more."""
    embedding: GroupConfig = GroupConfig()
    """Embedding tables, and a head tied to one."""
    head: GroupConfig = GroupConfig()
    """The output head, where it has weights of its own."""
    norm: GroupConfig = GroupConfig()
    """Scales and shifts of normalisation layers."""
    other: GroupConfig = GroupConfig()
    """Biases, routers of experts, small and unusual tensors."""
    groups: tuple[PatternConfig, ...] = ()
    """Parameters by name: they go before the roles, and no parameter may be in two of them."""

    def sections(self) -> dict[str, GroupConfig]:
        """Role -> what the recipe says about it."""
        return {
            "matrix": self.matrix,
            "embedding": self.embedding,
            "head": self.head,
            "norm": self.norm,
            "other": self.other,
        }

    def algorithms(self) -> tuple[dict, dict | None]:
        """Algorithm and its numbers for what is no matrix, and for matrices (null: the same), as a plan asks for them."""
        return {"algorithm": "adamw"}, self.group() if hasattr(self, "group") else None

    def rate(self, role: str) -> float:
        """Peak learning rate of a role that gives none."""
        return self.lr

    def problems(self, recipe) -> Iterator[Problem]:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            yield Problem("optimizer.lr", f"{self.lr} must be above 0; 1e-5 to 1e-4 is usual for adaptation")
        yield from decay_problem("optimizer", self.weight_decay)
        named = [(f"optimizer.{role}", group) for role, group in self.sections().items()]
        for where, group in named + [(f"optimizer.groups[{i}]", group) for i, group in enumerate(self.groups)]:
            if group.lr is not None and not (group.lr >= 0 and math.isfinite(group.lr)):
                yield Problem(f"{where}.lr", f"{group.lr} must be 0 (stays as it is) or more")
            if group.weight_decay is not None:
                yield from decay_problem(where, group.weight_decay)
        for index, group in enumerate(self.groups):
            if any(rows < 1 for rows in group.split):
                yield Problem(f"optimizer.groups[{index}].split", f"{list(group.split)}: every part has 1 row or more")
        yield from self.lost_in_bf16(recipe)

    def lost_in_bf16(self, recipe) -> Iterator[Problem]:
        rate = self.rate("matrix")
        if recipe.model.dtype == "bfloat16" and recipe.trainable.lora is None and 0 < rate < LOST_IN_BF16:
            key = "optimizer.lr" if rate == self.lr else "optimizer.lr x lr_ratio"
            yield Problem(
                "model.dtype",
                f"bfloat16 weights with {key}={rate:g} would mostly stay as they are: a step is about the learning "
                f"rate, and a weight of {TYPICAL:g} rounds away relative steps below 2^-9 (an lr below "
                f"{LOST_IN_BF16:.1e}). Keep the weights in float32; trainer.precision=bf16 computes in bfloat16 anyway",
            )


def decay_problem(where: str, decay: float) -> Iterator[Problem]:
    if not (decay >= 0 and math.isfinite(decay)):
        yield Problem(f"{where}.weight_decay", f"{decay} must be 0 or more")


def share_problems(config, *names: str) -> Iterator[Problem]:
    """Decays of running means."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            yield Problem(f"optimizer.{name}", f"{value} must be in [0, 1)")


def epsilon_problems(config) -> Iterator[Problem]:
    if not (config.eps > 0 and math.isfinite(config.eps)):
        yield Problem("optimizer.eps", f"{config.eps} must be above 0; 1e-8 is usual")


def given(config: GroupedConfig) -> list[str]:
    """Roles the recipe says something about."""
    return [role for role, group in config.sections().items() if group != GroupConfig()]


def newton_schulz_problems(config) -> Iterator[Problem]:
    """Of `ns_steps` and `ns_coefficients`."""
    if config.ns_steps < 1:
        yield Problem("optimizer.ns_steps", f"{config.ns_steps} must be 1 or more; 5 is usual")
    if len(config.ns_coefficients) != 3:
        what = f"{list(config.ns_coefficients)}: a quintic polynomial in x has three"
        yield Problem("optimizer.ns_coefficients", what)
