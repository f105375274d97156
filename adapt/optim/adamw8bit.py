"""AdamW with moments in 8 bits: about 2 bytes of state for a weight instead of 8. Needs torchao."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn

from adapt.components import optimizers
from adapt.errors import Problem, UserError
from adapt.optim.adamw import AdamWConfig
from adapt.optim.routing import param_groups
from adapt.optim.suite import Suite

MISSING = "needs the torchao package: pip install 'adapt-lm[lowbit]', or use adamw (four times the state)"


@dataclass(frozen=True, kw_only=True)
class AdamW8bitConfig(AdamWConfig):
    block_size: int = 256
    """Values that share a scale, at most: the largest power of two that divides a row and is not above this. Smaller
    blocks are more exact and take more memory (4 bytes a block)."""
    compile: bool = False
    """torch.compile the step of a tensor. Worth it on a GPU (it makes no full-size copies of the moments); every shape is
    compiled once, in seconds, and numbers that follow a schedule would be compiled anew at each step."""

    def algorithms(self) -> tuple[dict, dict | None]:
        return {"algorithm": "adamw8bit", "block_size": self.block_size}, None

    def problems(self, recipe) -> Iterator[Problem]:
        yield from super().problems(recipe)
        if find_spec("torchao") is None:
            yield Problem("optimizer.name", MISSING)
        if self.block_size < 32 or self.block_size & (self.block_size - 1):
            yield Problem("optimizer.block_size", f"{self.block_size} must be a power of two from 32; 256 is usual")
        if self.compile and recipe.optimizer_schedules:
            what = "true with optimizer_schedules would compile every step anew; leave one of them out"
            yield Problem("optimizer.compile", what)


@optimizers.register("adamw8bit")
def adamw8bit(config: AdamW8bitConfig, model: nn.Module) -> torch.optim.Optimizer:
    if find_spec("torchao") is None:
        raise UserError(Problem("optimizer.name", MISSING))
    numbers = {"algorithm": "adamw8bit", "beta1": config.beta1, "beta2": config.beta2, "eps": config.eps}
    numbers |= {"block_size": config.block_size, "compile": config.compile}
    return Suite(param_groups(config, model, numbers))
