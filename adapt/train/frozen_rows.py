"""`trainable.rows: new`: of the embedding and the head, only the rows that conversions filled train.

No optimizer knows of rows: decay, momentum from a stage before, or an update that mixes rows would move the others. So
their gradient is cleared before it is clipped (it has no part in the norm, and no moments gather), and whatever a step
did to them is taken back. That holds for any optimizer, and there is nothing to save: a resumed run does the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adapt.config.schema import Trainable
from adapt.conversion.base import filled_rows


def row_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Name -> the embedding's and the head's weight; one where they are tied."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    ours = {id(m.weight) for m in modules if m is not None}
    return {name: p for name, p in model.named_parameters() if id(p) in ours}


class FrozenRows:
    """Of the parameters that train now; none where `trainable.rows` is `all`."""

    def __init__(self, student: nn.Module, trainable: Trainable):
        parameters = row_parameters(student).values() if trainable.rows == "new" else []
        self.frozen = [(p, _others(p, filled_rows(student))) for p in parameters if p.requires_grad]
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def clear(self) -> None:
        """Gradients of frozen rows, on every rank's own shard."""
        for parameter, rows in self.frozen:
            if parameter.grad is not None:
                _local(parameter.grad).index_fill_(0, rows, 0)

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Every step of it leaves frozen rows as they were, bit for bit."""
        if self.frozen:
            optimizer.register_step_pre_hook(lambda *_: self._keep())
            optimizer.register_step_post_hook(lambda *_: self._restore())

    @torch.no_grad()
    def _keep(self) -> None:
        self.kept = [_local(parameter).index_select(0, rows) for parameter, rows in self.frozen]

    @torch.no_grad()
    def _restore(self) -> None:
        for (parameter, rows), kept in zip(self.frozen, self.kept, strict=True):
            _local(parameter).index_copy_(0, rows, kept)
        self.kept = []


def _others(parameter: nn.Parameter, filled: tuple[int, ...]) -> Tensor:
    """Indices into this rank's shard: rows that are not among the filled ones."""
    start = 0
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        start = offset[0]
    with torch.no_grad():
        local = _local(parameter)
    rows = torch.arange(start, start + len(local), device=local.device)
    new = torch.isin(rows, torch.tensor(filled, dtype=rows.dtype, device=local.device))
    return (~new).nonzero().flatten()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
