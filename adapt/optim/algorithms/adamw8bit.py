"""AdamW whose two moments are kept in 8 bits (Dettmers et al., arXiv 2110.02861): codes of a dynamic map, and a scale for
every block of values. Codes and arithmetic are torchao's; which tensors, and in which blocks, is decided here.

A block never reaches over the end of a row. FSDP2 cuts weights between rows, so one rank and many quantise alike, and a
checkpoint can be read on any number of them. torchao's own optimizer cuts blocks of 256 out of whatever a rank holds.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from adapt.optim.algorithms import Footprint, Shard, local

LEAST = 4096
"""Values from which a tensor is worth it; smaller ones have their moments in full."""
CODES = 4 * 256
"""Bytes of a tensor's map from codes to numbers."""
SHORTEST = 32
"""Values in a block: a scale takes 4 bytes, so that shorter ones save little."""


class AdamW8bit:
    """A parameter without a gradient is left alone, as torch leaves it: nothing here communicates."""

    def state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        block = block_of(parameter, group["block_size"])
        return {
            "step": torch.zeros((), dtype=torch.float32, device=local(parameter).device),
            "exp_avg": _zeros(parameter, block, signed=True),
            "exp_avg_sq": _zeros(parameter, block, signed=False),
        }

    def step(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor | None],
        states: list[dict[str, Tensor]],
        group: dict[str, Any],
    ) -> None:
        update = _update(group["compile"])
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            if gradient is None or local(parameter).numel() == 0:
                continue
            state["step"] += 1
            update(
                local(parameter),
                local(gradient),
                local(state["step"]),
                local(state["exp_avg"]),
                local(state["exp_avg_sq"]),
                None,
                torch.tensor(float(group["lr"]), device=local(parameter).device),
                group["beta1"],
                group["beta2"],
                group["weight_decay"],
                group["eps"],
                True,
                False,
            )

    def footprint(self, held: Shard, group: dict[str, Any], moved: int) -> Footprint:
        everywhere = held.rows(held.shape[0]) * (held.shards - 1) < held.shape[0]
        block = _block(held.shape, group["block_size"]) if everywhere else None
        if block is None:
            return Footprint(4 + 2 * 4 * held.local)
        return Footprint(4 + 2 * (held.local + 4 * (held.local // block) + CODES))


algorithm = AdamW8bit()


def block_of(parameter: Tensor, largest: int) -> int | None:
    """Values in a block: the largest power of two that divides a row and is at most `largest`; null where the moments are
    better kept in full (vectors, small tensors, rows of odd lengths, and where some rank would have no rows)."""
    return _block(tuple(parameter.shape), largest) if _rows_everywhere(parameter) else None


def _block(shape: tuple[int, ...], largest: int) -> int | None:
    if len(shape) < 2 or math.prod(shape) < LEAST:
        return None
    row = math.prod(shape[1:])
    block = min(row & -row, 1 << (largest.bit_length() - 1))
    return block if block >= SHORTEST else None


def _rows_everywhere(parameter: Tensor) -> bool:
    """Whether every rank of the mesh has some; true of what is not sharded. Sharded by anything but rows: false."""
    if not hasattr(parameter, "placements"):
        return True
    shards = [
        (parameter.device_mesh.size(i), p.dim) for i, p in enumerate(parameter.placements) if not p.is_replicate()
    ]
    if not shards:
        return True
    ((ranks, dim), *more) = shards
    chunk = -(-parameter.shape[0] // ranks)
    return not more and dim == 0 and chunk * (ranks - 1) < parameter.shape[0]


def _zeros(parameter: Tensor, block: int | None, *, signed: bool) -> Tensor:
    if block is None:
        return torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.preserve_format)
    from torch.distributed.tensor import DTensor
    from torchao.optim.subclass_8bit import OptimState8bit

    rows = local(parameter)
    codes = OptimState8bit.zeros(rows.shape, signed, block, rows.device, dtype=torch.float32)
    if not isinstance(parameter, DTensor):
        return codes
    return DTensor.from_local(
        codes,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


@cache
def _update(compiled: bool):
    """torchao's step of one tensor: decode, AdamW in float32, encode."""
    from torchao.optim.adam import single_param_adam

    return torch.compile(single_param_adam, fullgraph=True, dynamic=False) if compiled else single_param_adam
