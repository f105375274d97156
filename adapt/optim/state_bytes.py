"""What an optimizer keeps, measured: bytes of the memory behind its state."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of this rank's state: of a sharded tensor its own part, of a quantised one its codes and scales, of a view
    all that it keeps alive, and nothing twice."""
    storages = {}
    for leaf in tree_leaves(list(optimizer.state.values())):
        for tensor in plain_tensors(leaf) if isinstance(leaf, Tensor) else ():
            storage = tensor.untyped_storage()
            storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors a wrapper is made of."""
    if isinstance(tensor, DTensor):
        return plain_tensors(tensor.to_local())
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in plain_tensors(getattr(tensor, name))]
    return [tensor]
