"""Muon and SOAP over ranks: what one process makes, checkpoints that any number of ranks reads, bytes as counted by hand."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from adapt.optim.algorithms import local
from adapt.optim.exchange import traffic
from tests.optim.suites import close, gradients, steps, suite, weights
from tests.ranks import on_ranks

SHAPES = [(24, 24), (24, 24), (24, 24), (21, 12), (12, 42), (12, 42), (3, 20), (20, 1)]
"""Three, one and two of a shape, which neither 2 nor 4 divide; rows that are uneven, or too few for every rank."""
NAMES = ["muon", "soap"]


def spread(parameters, mesh: DeviceMesh, placements) -> list[nn.Parameter]:
    return [nn.Parameter(distribute_tensor(p.detach(), mesh, placements, src_data_rank=None)) for p in parameters]


def sharded_steps(optimizer, first: int, last: int, missing: bool = False) -> None:
    """As `steps`, each rank with its rows of the gradient. `missing`: ranks without rows have none at all."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, last):
        for parameter, gradient in zip(parameters, gradients(parameters, step), strict=True):
            whole = distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad = None if missing and local(parameter).numel() == 0 else whole
        optimizer.step()


def whole(parameters) -> list[torch.Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]


def equals_one_process(mesh: DeviceMesh, placements, names=tuple(NAMES), **fields) -> None:
    for name in names:
        extra = {"precondition_frequency": 2} if name == "soap" else {"ns_dtype": "float32"} | fields
        theirs = weights(SHAPES)
        ours = spread(theirs, mesh, placements)
        one, other = suite(name, theirs, lr=0.01, **extra), suite(name, ours, lr=0.01, **extra)
        for first, last in ((0, 2), (2, 5)):
            before = [p.detach().clone() for p in theirs]
            steps(one, first, last)
            sharded_steps(other, first, last, missing=True)
            assert close(whole(ours), theirs, before) < 1e-4, (name, mesh, placements)
        for parameter in ours:
            for entry in other.state[parameter].values():
                here = local(entry)
                assert here.untyped_storage().nbytes() == here.nbytes


def parts_equal_one_process(mesh: DeviceMesh) -> None:
    """A fused weight whose blocks start anywhere in the shards, experts, and a weight stored [in, out]."""
    cases = [([(47, 16)], {"split": (13, 20, 14)}), ([(5, 20, 16)], {}), ([(16, 30)], {"transposed": True})]
    for name in NAMES:
        for shapes, fields in cases:
            theirs = weights(shapes)
            ours = spread(theirs, mesh, [Shard(0)])
            before = [p.detach().clone() for p in theirs]
            one, other = suite(name, theirs, lr=0.01, **fields), suite(name, ours, lr=0.01, **fields)
            steps(one, 0, 5)
            sharded_steps(other, 0, 5)
            assert close(whole(ours), theirs, before) < 1e-4, (name, fields)


def counted(mesh: DeviceMesh) -> None:
    """Per rank and matrix: what leaves it is (W-1)/W² of all that goes to owners and back."""
    ranks, k, m, n = mesh.size(), 2 * mesh.size(), 8, 12
    expected = {
        "muon": 2 * (m * n + m * n),  # bfloat16, as Newton-Schulz is: 4mn there and back
        "soap": 4 * (3 * m * n + 2 * m * m + 2 * n * n) + 4 * (3 * m * n + m * m + n * n),
    }
    for name in NAMES:
        ours = spread(weights([(m, n)] * k), mesh, [Shard(0)])
        optimizer = suite(name, ours, **({"ns_dtype": "bfloat16"} if name == "muon" else {}))
        sharded_steps(optimizer, 0, 1)
        traffic.clear()
        sharded_steps(optimizer, 1, 2)
        assert traffic == {"all_to_all": k * expected[name] * (ranks - 1) // ranks**2}, name


def entries(optimizer) -> dict[str, torch.Tensor]:
    (group,) = optimizer.param_groups
    named = dict(enumerate(group["params"]))
    state = {f"{i}/{key}": value for i, p in named.items() for key, value in optimizer.state[p].items()}
    return state | {f"{i}/weight": p.detach() for i, p in named.items()}


def save(folder: Path, mesh: DeviceMesh) -> None:
    for name in NAMES:
        optimizer = suite(name, spread(weights(SHAPES), mesh, [Shard(0)]), lr=0.01)
        sharded_steps(optimizer, 0, 11)
        dcp.save(entries(optimizer), checkpoint_id=str(folder / name))


def go_on(folder: Path, mesh: DeviceMesh | None) -> None:
    """Load what `save` left, on another number of ranks, and go on as one process that never stopped."""
    for name in NAMES:
        straight = weights(SHAPES)
        steps(suite(name, straight, lr=0.01), 0, 11)
        before = [p.detach().clone() for p in straight]
        straight = weights(SHAPES)
        steps(suite(name, straight, lr=0.01), 0, 14)
        parameters = weights(SHAPES, seed=1)
        ours = parameters if mesh is None else spread(parameters, mesh, [Shard(0)])
        optimizer = suite(name, ours, lr=0.01)
        dcp.load(entries(optimizer), checkpoint_id=str(folder / name), no_dist=mesh is None)
        (steps if mesh is None else sharded_steps)(optimizer, 11, 14)
        assert close(whole(ours), straight, before) < 1e-4, name


def on_four(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (4,))
    equals_one_process(mesh, [Shard(0)])
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    equals_one_process(both, [Replicate(), Shard(0)])
    parts_equal_one_process(mesh)
    counted(mesh)
    save(folder, mesh)


def on_two(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    equals_one_process(mesh, [Shard(0)])
    equals_one_process(mesh, [Shard(0)], sharded="gather")
    equals_one_process(mesh, [Shard(1)], names=(*NAMES, "cosmos"))
    equals_one_process(mesh, [Replicate()])
    parts_equal_one_process(mesh)
    counted(mesh)
    go_on(folder, mesh)


def test_ranks_equal_one_process_and_read_each_others_checkpoints(tmp_path):
    on_ranks(4, tmp_path, on_four, tmp_path)
    on_ranks(2, tmp_path, on_two, tmp_path)
    go_on(tmp_path, None)
