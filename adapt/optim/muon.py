"""Muon for matrices, AdamW for the rest. The arithmetic is in algorithms/muon.py; here are its switches.

Defaults are those of Moonlight (Liu et al., arXiv 2502.16982): updates as large as AdamW's, so that one rate and decay
serve both. Jordan's original: `scale: original`, `weight_decay: 0`, `matrix: {lr: 0.02}`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from adapt.components import optimizers
from adapt.errors import Problem
from adapt.optim.groups import GroupedConfig, epsilon_problems, newton_schulz_problems, share_problems
from adapt.optim.newton_schulz import QUINTIC
from adapt.optim.routing import param_groups
from adapt.optim.suite import Suite


@dataclass(frozen=True, kw_only=True)
class MuonConfig(GroupedConfig):
    lr: float = 4.2e-4
    """Peak learning rate of matrices and of what AdamW trains; the default is Moonlight's, for training from scratch."""
    weight_decay: float = 0.1
    """Decoupled decay of parameters with two or more dimensions."""
    momentum: float = 0.95
    """Decay of the matrices' momentum, a running mean."""
    nesterov: bool = True
    """Read the momentum with the gradient in front."""
    scale: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    """Size of an update of m rows and n columns: lr x 0.2 sqrt(max(m, n)), whose root mean square is about that of
    AdamW's, or Jordan's lr x sqrt(max(1, m/n))."""
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the momentum in memory."""
    sharded: Literal["owners", "gather"] = "owners"
    """Several ranks: each matrix has its Newton-Schulz on one of them, or every rank gathers and works out everything
    (slower; for comparison)."""
    ns_steps: int = 5
    """Newton-Schulz iterations."""
    ns_coefficients: tuple[float, ...] = QUINTIC
    """Of the quintic polynomial, lowest power first."""
    ns_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Newton-Schulz computes in this; `auto` is bfloat16 on accelerators and float32 on the CPU."""
    adam_beta1: float = 0.9
    """AdamW's decay of the gradient's running mean."""
    adam_beta2: float = 0.95
    """AdamW's decay of the squared gradient's running mean."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""

    def problems(self, recipe) -> Iterator[Problem]:
        yield from super().problems(recipe)
        yield from share_problems(self, "momentum", "adam_beta1", "adam_beta2")
        yield from epsilon_problems(self)
        yield from newton_schulz_problems(self)

    def group(self) -> dict:
        """Of the matrices, for the Suite."""
        return {
            "algorithm": "muon",
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "scale": self.scale,
            "momentum_dtype": self.momentum_dtype,
            "sharded": self.sharded,
            "ns_steps": self.ns_steps,
            "ns_coefficients": self.ns_coefficients,
            "ns_dtype": self.ns_dtype,
        }


@optimizers.register("muon")
def muon(config: MuonConfig, model: nn.Module) -> torch.optim.Optimizer:
    adamw = {"algorithm": "adamw", "beta1": config.adam_beta1, "beta2": config.adam_beta2, "eps": config.eps}
    return Suite(param_groups(config, model, adamw, config.group()))
