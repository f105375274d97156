"""AdamW: decoupled weight decay on the matrices of linear layers, none on vectors (norms, biases) and embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from adapt.components import optimizers
from adapt.errors import Problem

TYPICAL = 0.02
"""Size of a weight of a pretrained model (most are initialised with this standard deviation)."""
LOST_IN_BF16 = TYPICAL * 2**-9
"""bfloat16 has 8 bits of precision: a relative step below half of the last one is rounded away."""


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
    decay_embeddings: bool = False
    """Decay embeddings too (and a head tied to them): rows of tokens the data lacks then shrink towards nothing."""

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
        if recipe.model.dtype == "bfloat16" and recipe.trainable.lora is None and 0 < self.lr < LOST_IN_BF16:
            yield Problem(
                "model.dtype",
                f"bfloat16 weights with optimizer.lr={self.lr:g} would mostly stay as they are: an AdamW step is about "
                f"lr, and a weight of {TYPICAL:g} rounds away relative steps below 2^-9 (an lr below "
                f"{LOST_IN_BF16:.1e}). Keep the weights in float32; trainer.precision=bf16 computes in bfloat16 anyway",
            )


@optimizers.register("adamw")
def adamw(config: AdamWConfig, model: nn.Module) -> torch.optim.Optimizer:
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in (p for p in model.parameters() if p.requires_grad):
        matrix = parameter.ndim >= 2 and (config.decay_embeddings or id(parameter) not in embeddings)
        (decayed if matrix else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
