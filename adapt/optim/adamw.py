"""AdamW: decoupled weight decay on the matrices of linear layers, none on vectors (norms, biases) and embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from adapt.components import optimizers
from adapt.errors import Problem
from adapt.optim.groups import GroupedConfig, epsilon_problems, share_problems
from adapt.optim.routing import param_groups
from adapt.optim.suite import Suite


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(GroupedConfig):
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of the squared gradient's running mean."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def problems(self, recipe) -> Iterator[Problem]:
        yield from super().problems(recipe)
        yield from share_problems(self, "beta1", "beta2")
        yield from epsilon_problems(self)


@optimizers.register("adamw")
def adamw(config: AdamWConfig, model: nn.Module) -> torch.optim.Optimizer:
    numbers = {"algorithm": "adamw", "beta1": config.beta1, "beta2": config.beta2, "eps": config.eps}
    return Suite(param_groups(config, model, numbers))
