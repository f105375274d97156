"""Activation checkpointing: what a layer's backward computes again, and what it finds kept."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Policy = bool | Literal["selective", "offload"]

ATTENTION = ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "flex_attention")
"""Parts of the names of attention's operations, of every backend."""
PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default")


def checkpoint_layers(model: nn.Module, policy: Policy) -> None:
    """`selective` keeps what attention returns and every second matrix product of a layer (as torchtitan does), `offload`
    keeps layers' inputs in the host's memory; both else recompute, as `True` does. The gradients are the same."""
    if not policy:
        return
    how: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        how["context_fn"] = _contexts
    away = policy == "offload" and torch.accelerator.is_available()  # without one they are there already
    model.activation_checkpointing_enable(how, offload=away)


def _contexts() -> tuple[Any, Any]:
    """For one layer's forward and its recomputation, which count their products apart."""
    counts = {False: 0, True: 0}

    def keep(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = str(operation)
        if name in PRODUCTS:
            again = context.is_recompute
            counts[again] += 1
            return CheckpointPolicy.MUST_SAVE if counts[again] % 2 else CheckpointPolicy.PREFER_RECOMPUTE
        if any(part in name for part in ATTENTION):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(keep)
