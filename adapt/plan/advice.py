"""What the plan warns of, and what to change: every remedy is planned before it is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from adapt.config.schema import Mesh
from adapt.plan.cluster import GIB
from adapt.plan.stage import StagePlan
from adapt.plan.units import duration

ENOUGH = 8
"""Times the GPUs, at most, that a remedy asks for."""


def warnings(plan: StagePlan) -> list[str]:
    return [*_batch(plan), *_memory(plan), *_network(plan), *_host(plan), *_optimizer(plan)]


def _batch(plan: StagePlan) -> Iterator[str]:
    trainer, length, ranks = plan.recipe.trainer, plan.recipe.data.seq_len, plan.grid.ranks
    if trainer.batch_tokens != plan.tokens_a_step:
        yield (
            f"trainer.batch_tokens={trainer.batch_tokens:,} is not a multiple of {ranks} ranks x {length:,} tokens a row, and "
            f"`adapt fit` refuses it; planned with {plan.tokens_a_step:,}"
        )
    if trainer.microbatch != "auto" and plan.rows < trainer.microbatch:
        yield f"trainer.microbatch={trainer.microbatch} is more than the {plan.rows_a_rank} row(s) a rank has in a step"


def _memory(plan: StagePlan) -> Iterator[str]:
    if plan.fits:
        return
    worst = plan.worst(plan.rows)
    yield (
        f"does not fit: {worst.total / GIB:.1f} GiB at the moment `{worst.name}` with a microbatch of {plan.rows} row(s), and "
        f"{plan.room / GIB:.1f} GiB are there"
    )
    first = ""
    found = list(_remedies(plan))
    if not found and plan.recipe.trainer.activation_checkpointing is False:
        first = "trainer.activation_checkpointing=true "
        found = list(_remedies(plan.changed(activation_checkpointing=True)))
    yield from (f"  {first}{text}" for text in found)
    if not found:
        yield "  none of the changes tried makes it fit: lower data.seq_len, or take GPUs with more memory and more of them"


def _remedies(plan: StagePlan) -> Iterator[str]:
    fixed = plan.recipe.trainer.microbatch != "auto"
    also = "with trainer.microbatch=auto " if fixed else ""

    def helps(other: StagePlan) -> str:
        other = other.changed(microbatch="auto")
        if not other.fits:
            return ""
        host = (other.host_bytes + other.kept_away) * other.cluster.per_node / GIB
        away = f", and {host:,.0f} GiB of the host's in each node" if host else ""
        return f"{also}{other.worst(other.rows).total / GIB:.1f} GiB with {other.rows} row(s){away}"

    if fixed and (took := helps(plan).removeprefix(also)):
        yield f"trainer.microbatch=auto: {took}"
    had = plan.recipe.trainer.activation_checkpointing
    for policy in ([] if had else ["selective", True]) + ([] if had == "offload" else ["offload"]):
        if took := helps(plan.changed(activation_checkpointing=policy)):
            yield f"trainer.activation_checkpointing={str(policy).lower()}: {took}"
            break
    mesh = plan.recipe.trainer.mesh
    if not mesh.offload and (took := helps(plan.changed(mesh=dataclasses.replace(mesh, offload=True)))):
        yield f"trainer.mesh.offload=true (weights and the optimizer's state leave the GPU): {took}"
    if plan.grid.replicas > 1 and (took := helps(plan.changed(mesh=Mesh(offload=mesh.offload)))):
        yield f"trainer.mesh.replicate=1 trainer.mesh.shard=auto (one copy of the model over all ranks): {took}"
    more = 2
    while more <= ENOUGH:
        wider = plan.changed(
            dataclasses.replace(plan.cluster, gpus=plan.cluster.gpus * more), mesh=Mesh(offload=mesh.offload)
        )
        if took := helps(wider):
            mesh_too = (
                ""
                if mesh.replicate == 1 and mesh.shard == "auto"
                else "trainer.mesh.replicate=1 trainer.mesh.shard=auto "
            )
            yield f"--gpus {wider.cluster.gpus} {mesh_too}(the model sharded over all of them): {took}"
            return
        more *= 2


def _network(plan: StagePlan) -> Iterator[str]:
    compute, travel = plan.compute_seconds, plan.traffic_seconds
    if travel <= compute or plan.grid.ranks == 1:
        return
    yield f"the network is the limit: {duration(travel)} a step of collectives beside {duration(compute)} of arithmetic"
    node = plan.cluster.per_node
    if plan.grid.replicas == 1 and plan.grid.ranks > node and plan.grid.ranks % node == 0:
        other = plan.changed(mesh=Mesh(shard=node, replicate=plan.grid.ranks // node))
        if other.fits and other.step_seconds < plan.step_seconds:
            mesh = f"trainer.mesh={{shard: {node}, replicate: {plan.grid.ranks // node}}}"
            yield f"  {mesh} (a copy in each node): {other.tokens_per_second:,.0f} tokens/s"
    if plan.microbatches > 1:
        yield f"  every one of the {plan.microbatches} microbatches gathers the model: larger ones gather it less often"


def _host(plan: StagePlan) -> Iterator[str]:
    node = plan.cluster.per_node
    if held := plan.host_bytes + plan.kept_away:
        yield f"{held * node / GIB:,.0f} GiB of the host's memory in each node, for {node} GPU(s)"
    if plan.setup.offload:
        yield "the optimizer's step runs on the host's processors, and its time is not in the plan"


def _optimizer(plan: StagePlan) -> Iterator[str]:
    if not plan.optimizer.known:
        yield f"the optimizer {plan.recipe.optimizer.name} does not say what it keeps, so its state is not in the plan"
