"""The plan on a terminal, and as JSON."""

from __future__ import annotations

from typing import Any

from adapt.plan.advice import warnings
from adapt.plan.cluster import GIB, Cluster
from adapt.plan.stage import StagePlan
from adapt.plan.units import count, duration, gib


def to_dict(plan: StagePlan) -> dict[str, Any]:
    """Numbers in bytes, seconds and operations."""
    one, worst = plan.arithmetic, plan.worst(plan.rows)
    return {
        "stage": plan.name,
        "model": {
            "base": plan.recipe.model.base,
            "parameters": roles(plan),
            "trained": plan.student.parameters(trained=True),
        },
        "teacher": None
        if plan.teacher is None
        else {"parameters": plan.teacher.parameters(), "dtype": plan.teacher.dtype},
        "mesh": {"shard": plan.grid.shards, "replicate": plan.grid.replicas},
        "microbatch": {"rows": plan.rows, "largest_that_fits": plan.largest, "per_step_and_rank": plan.microbatches},
        "memory": {
            "fits": plan.fits,
            "room": plan.room,
            "host": plan.host_bytes + plan.kept_away,
            "worst": worst.name,
            "moments": {m.name: m.kinds | {"total": m.total} for m in plan.moments(plan.rows)},
        },
        "traffic": [
            {
                "kind": sent.kind,
                "across": sent.across,
                "count": sent.count * plan.microbatches,
                "bytes": sent.bytes * plan.microbatches,
                "wire_bytes_per_rank": sent.wire(plan.grid) * plan.microbatches,
            }
            for sent in plan.sent
        ],
        "optimizer_bytes_sent_per_rank": plan.optimizer.sent,
        "flops_per_row": {"student": one.student, "recomputed": one.recomputed, "teacher": one.teacher}
        | {"total": one.total},
        "step": {
            "tokens": plan.tokens_a_step,
            "seconds": plan.step_seconds,
            "compute_seconds": plan.compute_seconds,
            "traffic_seconds": plan.traffic_seconds,
            "host_seconds": plan.host_seconds,
            "optimizer_seconds": plan.optimizer_seconds,
        },
        "steps": plan.steps,
        "tokens_per_second": plan.tokens_per_second,
        "days": plan.days,
        "warnings": warnings(plan),
    }


def roles(plan: StagePlan) -> dict[str, int]:
    found: dict[str, int] = {}
    for weight in plan.student.weights:
        key = "adapters" if weight.adapter else "created by conversions" if weight.created else weight.role
        found[key] = found.get(key, 0) + weight.numel
    return found | {"total": plan.student.parameters()}


def assumptions(cluster: Cluster) -> dict[str, Any]:
    kind = cluster.kind
    return {
        "gpu": cluster.gpu,
        "gpus": cluster.gpus,
        "gpus_per_node": cluster.per_node,
        "gpu_memory_gib": cluster.memory,
        "reserve_gib": cluster.reserve,
        "bf16_flops": kind.flops,
        "efficiency": cluster.efficiency,
        "bytes_per_second_in_node": kind.inside,
        "bytes_per_second_between_nodes_and_gpu": kind.outside,
        "network_efficiency": cluster.network,
    }


def print_assumptions(cluster: Cluster, notes: list[str], console: Any) -> None:
    kind = cluster.kind
    nodes = -(-cluster.gpus // cluster.per_node)
    console.print(
        f"{cluster.gpus} x {cluster.gpu} of {cluster.memory:g} GiB in {nodes} node(s); {cluster.reserve:g} GiB of each are left "
        "for CUDA, NCCL and what the allocator loses",
        soft_wrap=True,
    )
    console.print(
        f"assumed: {cluster.efficiency:.0%} of {kind.flops / 1e12:,.0f} TFLOP/s (bf16); {cluster.network:.0%} of "
        f"{kind.inside / 1e9:,.0f} GB/s within a node and {kind.outside / 1e9:,.1f} GB/s per GPU between nodes; collectives run "
        "beside the arithmetic; a row is one document; no evaluation, no checkpoint, no data",
        soft_wrap=True,
    )
    for note in notes:
        console.print(f"? {note}", soft_wrap=True)


def print_plan(plan: StagePlan, console: Any) -> None:
    from rich.text import Text

    title = f"{plan.recipe.run.name}{': ' if plan.name else ''}{plan.name}"
    console.print()
    console.print(Text(title, style="bold"))
    _print_facts(plan, console)
    _print_memory(plan, console)
    _print_traffic(plan, console)
    for line in warnings(plan):
        console.print(Text(f"{'' if line.startswith(' ') else '! '}{line}", style="yellow"), soft_wrap=True)


def _print_facts(plan: StagePlan, console: Any) -> None:
    by_role = {k: v for k, v in roles(plan).items() if k != "total"}
    one, work = plan.arithmetic, plan.work
    facts = {
        "model": f"{plan.recipe.model.base}: {plan.student.parameters():,} parameters, "
        f"{plan.student.parameters(trained=True):,} train ({', '.join(f'{k} {count(v)}' for k, v in by_role.items())})",
        "teacher": ""
        if plan.teacher is None
        else f"{plan.recipe.teacher.base}: {plan.teacher.parameters():,} parameters in {plan.teacher.dtype}, reads "
        f"{work.taught:.0%} of the rows",
        "mesh": "one GPU holds all"
        if plan.grid.ranks == 1
        else f"{plan.grid.replicas} copies of the model, each in {plan.grid.shards} shards"
        if plan.grid.replicas > 1
        else f"one copy of the model in {plan.grid.shards} shards",
        "step": f"{plan.tokens_a_step:,} tokens: {plan.rows_a_rank} row(s) of {work.seq_len:,} per rank"
        + (f", each read as {work.read:,} tokens" if work.copies > 1 else ""),
        "microbatch": f"{plan.rows} row(s) x {plan.microbatches}"
        + (f"; the largest that fits is {plan.largest}" if plan.fits else ""),
        "arithmetic": f"{one.total / work.seq_len / 1e9:,.1f} GFLOP a token, {one.recomputed / one.total:.0%} of it recomputed"
        + (f", {one.teacher / one.total:.0%} the teacher's" if one.teacher else ""),
        "time": f"{duration(plan.step_seconds)} a step (arithmetic {duration(plan.compute_seconds)}, collectives beside it "
        f"{duration(plan.traffic_seconds)}, {f'host {duration(plan.host_seconds)}, ' if plan.host_seconds else ''}then optimizer {duration(plan.optimizer_seconds)}); "
        f"{plan.tokens_per_second:,.0f} tokens/s",
        "length": f"{plan.steps:,} steps, {plan.steps * plan.tokens_a_step:,} tokens: {duration(plan.days * 86400)}",
    }
    width = max(map(len, facts))
    for name, text in facts.items():
        if text:
            console.print(f"{name:<{width}}  {text}", soft_wrap=True)


def _print_memory(plan: StagePlan, console: Any) -> None:
    found = plan.moments(plan.rows)
    worst = plan.worst(plan.rows)
    table = _table("GiB of a rank", [f"{m.name}{' *' if m.name == worst.name else ''}" for m in found])
    for kind in dict.fromkeys(kind for moment in found for kind in moment.kinds):
        table.add_row(kind, *(gib(moment.kinds.get(kind, 0.0)) for moment in found))
    table.add_row("total", *(gib(m.total) for m in found), style="bold")
    console.print(table)
    verdict = "fits" if plan.fits else "does not fit"
    console.print(f"* the worst: {worst.total / GIB:.1f} of {plan.room / GIB:.1f} GiB, which {verdict}")


def _print_traffic(plan: StagePlan, console: Any) -> None:
    if plan.grid.ranks == 1:
        return
    table = _table("a rank's traffic of a step", ["collectives", "GB of buffers", "GB on the wire"])
    for sent in plan.sent:
        total, wire = (x * plan.microbatches / 1e9 for x in (sent.bytes, sent.wire(plan.grid)))
        table.add_row(
            f"{sent.kind} ({sent.across})", f"{sent.count * plan.microbatches:,}", f"{total:,.2f}", f"{wire:,.2f}"
        )
    if plan.optimizer.sent:
        table.add_row("optimizer", "", "", f"{plan.optimizer.sent / 1e9:,.2f}")
    console.print(table)


def _table(title: str, columns: list[str]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(title, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def print_seen(planned: dict[str, tuple[float, float]], console: Any) -> None:
    """`planned`: what -> (formula, seen)."""
    console.print("one microbatch of one row (or pair) on fake ranks, with the kernels of a CPU:")
    table = _table("", ["formula", "seen", "difference"])
    for what, (formula, seen) in planned.items():
        apart = "0" if formula == seen else f"{formula / seen - 1:+.1%}" if seen else "not seen"
        table.add_row(what, f"{formula:,.0f}", f"{seen:,.0f}", apart)
    console.print(table)
    if not any(what.startswith("memory") for what in planned):
        console.print(
            "torch's tracker cannot follow the memory of layers that learn by themselves: it is the formula's alone",
            soft_wrap=True,
        )
