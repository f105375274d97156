"""COSMOS for matrices, AdamW for the rest. The arithmetic is in algorithms/cosmos.py; here are its switches.

Defaults are those of the authors' repository (README of February 2026) as our reading of paper and code recommends them.
The paper's equations: `beta1: 0.9`, `beta2: 0.98`, `nesterov: false`, `eps_inside: true`, `gamma: lr_ratio`, decay 0. Its
momentum is a mean instead of a sum, which the read-out divides out again. The repository's signature: `beta1: 0.9`,
`beta2: 0.999`, `lr_ratio: 0.1`, `wd_lr: base`, `init: svd`, `reproject: false`.
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
from adapt.optim.routing import param_groups
from adapt.optim.suite import Suite


@dataclass(frozen=True, kw_only=True)
class CosmosConfig(GroupedConfig):
    lr: float = 2e-3
    """Peak learning rate of what AdamW trains (embeddings, head, norms); the default is for training from scratch, and
    a pretrained model wants AdamW's usual 1e-5 to 1e-4."""
    lr_ratio: float = 0.2
    """Matrices' rate over `lr`: the root mean square of every update of a matrix is lr x lr_ratio."""
    weight_decay: float = 0.1
    """Decoupled decay of parameters with two or more dimensions."""
    wd_lr: Literal["group", "base"] = "group"
    """What a matrix's decay is multiplied by: its own rate, or `lr` as the authors' code does."""
    beta1: float = 0.95
    """Decay of the matrices' momentum."""
    beta2: float = 0.95
    """Decay of the squared projected gradient."""
    beta3: float | None = None
    """Decay of the basis and the second moment in it; null: beta2."""
    rank: int | float = 64
    """Columns of the basis; a number below 1 is a share of a matrix's inputs, in multiples of 16 (0.05 is the paper's
    analysis). 0 is normalised Muon, all inputs one-sided SOAP; never more than the matrix has."""
    gamma: float | Literal["lr_ratio"] = 0.2
    """Weight of the orthogonalised part; `lr_ratio` ties it to that key, as the paper does. 0 leaves only the basis."""
    nesterov: bool = True
    """Read the momentum with the gradient in front; the paper's equations have it off."""
    eps: float = 1e-8
    """Added to roots of second moments and to norms."""
    eps_inside: bool = False
    """Add eps under the root, as the paper writes it."""
    init: Literal["range", "svd"] = "range"
    """The first basis: a randomised range finder, or an SVD of the first gradient (slow for large matrices)."""
    orth: Literal["auto", "qr", "cholesky"] = "auto"
    """How the basis is made orthonormal: Householder QR, or batched Cholesky QR, which `auto` takes on accelerators."""
    reproject: bool = True
    """Take out of the orthogonalised part what rounding put into the basis: nothing in exact arithmetic, 1 to 6 % of it
    in bfloat16. The authors' code leaves it in."""
    basis_side: Literal["input", "output"] = "input"
    """Which side of a matrix has the basis; with `output` a weight sharded by rows is gathered for its step."""
    sharded: Literal["owners", "gather"] = "owners"
    """Several ranks: each matrix has its Newton-Schulz on one of them, or every rank gathers and works out everything
    (slower; for comparison)."""
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the momentum in memory; basis and second moments are float32 always."""
    ns_steps: int = 5
    """Newton-Schulz iterations."""
    ns_coefficients: tuple[float, ...] = (3.4445, -4.7750, 2.0315)
    """Of the quintic polynomial, lowest power first."""
    ns_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Newton-Schulz computes in this; `auto` is bfloat16 on accelerators and float32 on the CPU."""
    compile: bool = False
    """Compile what lies between the matrix products: fewer passes over memory, once per shape of matrix."""
    adam_beta1: float = 0.9
    """AdamW's decay of the gradient's running mean."""
    adam_beta2: float = 0.95
    """AdamW's decay of the squared gradient's running mean."""

    def rate(self, role: str) -> float:
        return self.lr * self.lr_ratio if role == "matrix" else self.lr

    def problems(self, recipe) -> Iterator[Problem]:
        yield from super().problems(recipe)
        yield from share_problems(self, "beta1", "beta2", "beta3", "adam_beta1", "adam_beta2")
        yield from epsilon_problems(self)
        if not self.lr_ratio > 0:
            yield Problem("optimizer.lr_ratio", f"{self.lr_ratio} must be above 0; 0.2 matches AdamW's step size")
        if self.rank < 0 or (isinstance(self.rank, float) and self.rank >= 1):
            what = f"{self.rank} must be a whole number from 0 or a share of the inputs below 1; 64 or 0.05 is usual"
            yield Problem("optimizer.rank", what)
        if self.gamma != "lr_ratio" and self.gamma < 0:
            yield Problem("optimizer.gamma", f"{self.gamma} must be 0 or more; 0.2 to 0.5 is usual")
        if self.rank == 0 and self.gamma == 0:
            yield Problem("optimizer.gamma", "0 with rank 0 leaves no update at all; raise one of them")
        yield from newton_schulz_problems(self)

    def group(self) -> dict:
        """Of the matrices, for the Suite."""
        return {
            "algorithm": "cosmos",
            "gamma": self.lr_ratio if self.gamma == "lr_ratio" else self.gamma,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "beta3": self.beta3,
            "rank": self.rank,
            "nesterov": self.nesterov,
            "eps": self.eps,
            "eps_inside": self.eps_inside,
            "init": self.init,
            "orth": self.orth,
            "reproject": self.reproject,
            "basis_side": self.basis_side,
            "sharded": self.sharded,
            "momentum_dtype": self.momentum_dtype,
            "ns_steps": self.ns_steps,
            "ns_coefficients": self.ns_coefficients,
            "ns_dtype": self.ns_dtype,
            "wd_lr": self.wd_lr,
            "compile": self.compile,
        }


@optimizers.register("cosmos")
def cosmos(config: CosmosConfig, model: nn.Module) -> torch.optim.Optimizer:
    adamw = {"algorithm": "adamw", "beta1": config.adam_beta1, "beta2": config.adam_beta2, "eps": config.eps}
    return Suite(param_groups(config, model, adamw, config.group()))
