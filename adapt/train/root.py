"""The FSDP root: a thin module whose forward calls what it is given, so that embedding and head are whole there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from adapt.objectives.base import Models


class Frozen(nn.Module):
    """A model that learns nothing, the root of its own shards: `forward(fn)` is `fn(model)` with its head whole."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    def forward(self, fn: Callable[[nn.Module], Any]) -> Any:
        return fn(self.model)


class Root(nn.Module):
    teacher: Frozen | None

    def __init__(self, student: nn.Module, teacher: Frozen | None = None):
        super().__init__()
        self.student = student
        self.teach(teacher)

    def teach(self, teacher: Frozen | None) -> None:
        """Give it a teacher. Not a submodule: optimizers, checkpoints and `train()` are for what learns."""
        self.__dict__["teacher"] = teacher

    def forward(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(models, *args)` with unsharded root parameters: an objective, a suite's or a sampler's call."""
        if self.teacher is None:
            return fn(Models(self.student), *args)
        sharded = hasattr(self.teacher, "reshard")
        return self.teacher(lambda teacher: fn(Models(self.student, teacher, sharded), *args))


def look(root: Root, fn: Callable[..., Any], *args: Any) -> Any:
    """`root(fn, *args)` without gradients. FSDP2 leaves the root's parameters whole after a forward, for a backward
    that never comes here; they go back to their shards, or whoever asks for parameters next gets the wrong ones."""
    with torch.no_grad():
        result = root(fn, *args)
    if hasattr(root, "reshard"):
        root.reshard()
    return result


def look_at(frozen: Frozen, fn: Callable[..., Any], *args: Any) -> Any:
    """The same of a frozen model, which is the student of what `fn` is called with."""
    with torch.no_grad():
        result = frozen(lambda model: fn(Models(model), *args))
    if hasattr(frozen, "reshard"):
        frozen.reshard()
    return result
