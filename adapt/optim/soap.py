"""SOAP for matrices, AdamW for the rest. The arithmetic is in algorithms/soap.py; here are its switches.

Defaults are those of the authors' repository (arXiv 2409.11321). There embeddings and head get a basis on their short
side; here they are AdamW's, as with the other matrix optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from adapt.components import optimizers
from adapt.errors import Problem
from adapt.optim.groups import GroupedConfig, epsilon_problems, share_problems
from adapt.optim.routing import param_groups
from adapt.optim.suite import Suite


@dataclass(frozen=True, kw_only=True)
class SoapConfig(GroupedConfig):
    lr: float = 3e-3
    """Peak learning rate; the default is for training from scratch, and a pretrained model wants AdamW's usual 1e-5 to
    1e-4."""
    weight_decay: float = 0.01
    """Decoupled decay of parameters with two or more dimensions."""
    beta1: float = 0.95
    """Decay of the rotated gradient's running mean, and of AdamW's."""
    beta2: float = 0.95
    """Decay of its square's running mean, and of AdamW's."""
    shampoo_beta: float | None = None
    """Decay of the preconditioners; null: beta2."""
    eps: float = 1e-8
    """Added to the root of second moments."""
    precondition_frequency: int = 10
    """Steps from one turn of the bases to the next; a turn costs a QR decomposition of each side."""
    max_precond_dim: int = 10000
    """A side longer than this has no basis, and its 2 x size x size state is saved."""
    sides: Literal["both", "smaller"] = "both"
    """Which sides of a matrix have a basis; `smaller` (the inputs of a square one) halves state and time or better."""

    def problems(self, recipe) -> Iterator[Problem]:
        yield from super().problems(recipe)
        yield from share_problems(self, "beta1", "beta2", "shampoo_beta")
        yield from epsilon_problems(self)
        if self.precondition_frequency < 1:
            yield Problem(
                "optimizer.precondition_frequency", f"{self.precondition_frequency} must be 1 or more; 10 is usual"
            )
        if self.max_precond_dim < 1:
            what = f"{self.max_precond_dim} leaves no side a basis, which is AdamW; 10000 is usual"
            yield Problem("optimizer.max_precond_dim", what)

    def group(self) -> dict:
        """Of the matrices, for the Suite."""
        return {
            "algorithm": "soap",
            "beta1": self.beta1,
            "beta2": self.beta2,
            "shampoo_beta": self.shampoo_beta,
            "eps": self.eps,
            "precondition_frequency": self.precondition_frequency,
            "max_precond_dim": self.max_precond_dim,
            "sides": self.sides,
        }


@optimizers.register("soap")
def soap(config: SoapConfig, model: nn.Module) -> torch.optim.Optimizer:
    adamw = {"algorithm": "adamw", "beta1": config.beta1, "beta2": config.beta2, "eps": config.eps}
    return Suite(param_groups(config, model, adamw, config.group()))
