"""Layers on the meta device get their weights after they are sharded: every rank reads its own rows from the files, and
none ever holds the whole model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from adapt.pretrained.lora import ADAPTER, start_of
from adapt.pretrained.outline import WeightFiles, put

BASE = ".base_layer."
"""What an adapter puts into the name of the weight it adapts."""


@torch.no_grad()
def fill(model: nn.Module, files: WeightFiles, device: torch.device, seed: int) -> None:
    """Fill every meta parameter of the sharded `model`. Adapters start as `adapt.pretrained.lora` starts them."""
    empty = {name: p for name, p in model.named_parameters() if p.is_meta}
    spans = {name: _rows(p) for name, p in empty.items()}
    adapters = {name for name in empty if name.endswith(f".{ADAPTER}.weight") and ".lora_" in name}
    for name in adapters:
        start, stop = spans[name]
        _fill(model, name, empty[name], start_of(name, empty[name].shape, seed)[start:stop], device)
    stored = {name.replace(BASE, "."): name for name in empty if name not in adapters}
    for wanted, rows in files.rows({wanted: spans[name] for wanted, name in stored.items()}):
        name = stored[wanted]
        _fill(model, name, empty[name], rows, device)


def _rows(parameter: Tensor) -> tuple[int, int]:
    """First and last + 1 of the rows that this rank has."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    start = min(offset[0], parameter.shape[0])  # of a rank without a row it is beyond the end
    return start, start + shape[0]


def _fill(model: nn.Module, name: str, parameter: Tensor, rows: Tensor, device: torch.device) -> None:
    local = torch.empty(rows.shape, dtype=parameter.dtype, device=device).copy_(rows)  # never a view of the file
    if not isinstance(parameter, DTensor):
        put(model, name, local)
        return
    whole = DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    put(model, name, whole)
