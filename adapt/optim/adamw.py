"""AdamW: decoupled weight decay on matrices, none on vectors (norms, biases) and embeddings' rows as usual."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from adapt.components import optimizers
from adapt.errors import Problem


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    lr: float = 1e-5
    """Peak learning rate; the schedule multiplies it."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of the squared gradient's running mean."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled decay of parameters with two or more dimensions; 0 is usual when little data meets a trained model."""

    def problems(self, recipe) -> Iterator[Problem]:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            yield Problem("optimizer.lr", f"{self.lr} must be above 0; 1e-5 to 1e-4 is usual for adaptation")
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                yield Problem(f"optimizer.{key}", f"{getattr(self, key)} must be in [0, 1)")
        if not (self.eps > 0 and math.isfinite(self.eps)):
            yield Problem("optimizer.eps", f"{self.eps} must be above 0; 1e-8 is usual")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            yield Problem("optimizer.weight_decay", f"{self.weight_decay} must be 0 or more")


@optimizers.register("adamw")
def adamw(config: AdamWConfig, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
