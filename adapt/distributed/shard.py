"""FSDP2: every decoder layer its own group, the rest (embedding, norm, head) with the root."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from adapt.config.schema import Mesh
from adapt.distributed.world import World
from adapt.errors import Problem, UserError


def make_mesh(world: World, mesh: Mesh) -> DeviceMesh:
    """Ranks as (replicate, shard); raises UserError when the numbers do not multiply to the ranks there are."""
    shard = world.size // mesh.replicate if mesh.shard == "auto" else mesh.shard
    if shard * mesh.replicate != world.size:
        raise UserError(
            Problem(
                "trainer.mesh",
                f"shard={mesh.shard} x replicate={mesh.replicate} does not make the {world.size} ranks of this run; "
                f"give numbers whose product is {world.size}, or shard: auto",
            )
        )
    kind = world.device.type
    if mesh.replicate == 1:
        return init_device_mesh(kind, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (mesh.replicate, shard), mesh_dim_names=("replicate", "shard"))


def shard(
    root: nn.Module, models: list[nn.Module], mesh: DeviceMesh, compute: torch.dtype | None, offload: bool = False
) -> None:
    """Shard in place. Master weights keep their dtype, matmuls run in `compute` (null: as they are), gradients are reduced
    in fp32. `offload`: the shards and their gradients are on the CPU."""
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    pinned = torch.accelerator.is_available()
    where = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    for model in models:
        for layer in model.get_decoder().layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=where)
    # The root's inputs are objectives and batches: loss weights in them stay fp32.
    policy = dataclasses.replace(policy, cast_forward_inputs=False)
    # A backward needs the head again at once; where none comes, the root goes back to its shards.
    frozen = not any(p.requires_grad for p in root.parameters())
    fully_shard(root, mesh=mesh, mp_policy=policy, offload_policy=where, reshard_after_forward=frozen)
    if frozen:  # a student that is called within it gives it outputs with gradients, which are not of its parameters
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_unshard_in_backward(False)
