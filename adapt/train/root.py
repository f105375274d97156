"""The FSDP root: a thin module whose forward calls what it is given, so that embedding and head are whole there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from adapt.objectives.base import Models


class Root(nn.Module):
    def __init__(self, student: nn.Module, teacher: nn.Module | None = None):
        super().__init__()
        self.student = student
        self.teacher = teacher

    def forward(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(models, *args)` with unsharded root parameters: an objective, a suite's or a sampler's call."""
        return fn(Models(self.student, self.teacher), *args)


def look(root: Root, fn: Callable[..., Any], *args: Any) -> Any:
    """`root(fn, *args)` without gradients. FSDP2 leaves the root's parameters whole after a forward, for a backward
    that never comes here; they go back to their shards, or whoever asks for parameters next gets the wrong ones."""
    with torch.no_grad():
        result = root(fn, *args)
    if hasattr(root, "reshard"):
        root.reshard()
    return result
