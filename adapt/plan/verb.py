"""`adapt plan -c RECIPE --gpus 64 --gpu-memory 80`: from formulas, and with --verify beside one microbatch on fake ranks."""

from __future__ import annotations

import argparse
import json
from math import isfinite
from typing import TYPE_CHECKING, Any

from adapt.errors import Problem, UserError

if TYPE_CHECKING:
    from adapt.plan.cluster import Cluster
    from adapt.plan.stage import StagePlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs in all")
    parser.add_argument("--gpu-memory", type=float, required=True, metavar="GIB", help="memory of one of them")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--gpu", default="h100", metavar="KIND", help="a100, h100 (default), h200, b200, l40s")
    parser.add_argument(
        "--efficiency",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="of the peak arithmetic that is reached; default: 0.4",
    )
    parser.add_argument(
        "--network", type=float, default=0.7, metavar="SHARE", help="of the links' rate that is reached; default: 0.7"
    )
    parser.add_argument(
        "--reserve", type=float, default=4.0, metavar="GIB", help="left for CUDA, NCCL and the allocator; default: 4"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="also run one microbatch on a fake process group, and compare what it sends and holds (minutes for 70B)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes and seconds")


def cluster_of(args: argparse.Namespace) -> Cluster:
    """Raises UserError with every number that makes no cluster."""
    from adapt.errors import nearest
    from adapt.plan.cluster import GPUS, Cluster

    problems = [
        Problem(f"--{name}", f"{value} must be 1 or more")
        for name, value in (("gpus", args.gpus), ("gpus-per-node", args.gpus_per_node))
        if value < 1
    ]
    if args.gpu not in GPUS:
        problems.append(
            Problem("--gpu", f"{args.gpu!r} is not known here.{nearest(args.gpu, GPUS)} Known: {', '.join(GPUS)}")
        )
    if not (args.gpu_memory > 0 and isfinite(args.gpu_memory)):
        problems.append(
            Problem("--gpu-memory", f"{args.gpu_memory:g} is no memory to plan with: GiB of one GPU, 80 say")
        )
    elif not 0 <= args.reserve < args.gpu_memory:
        what = f"{args.reserve:g} of {args.gpu_memory:g} GiB: give 0 or more, and less than the GPU has"
        problems.append(Problem("--reserve", what))
    for name in ("efficiency", "network"):
        if not 0 < getattr(args, name) <= 1:
            problems.append(Problem(f"--{name}", f"{getattr(args, name)} is a share: above 0, at most 1"))
    if problems:
        raise UserError(problems)
    per_node = min(args.gpus, args.gpus_per_node)
    return Cluster(args.gpus, args.gpu_memory, per_node, args.gpu, args.efficiency, args.reserve, args.network)


def plan(resolved: Any, args: argparse.Namespace) -> int:
    """0, or 1 where a stage does not fit."""
    cluster = cluster_of(args)
    from adapt.plan import show
    from adapt.plan.read import stage_plans

    plans, notes = stage_plans(resolved, cluster)
    seen = [verified(one) for one in plans] if args.verify else [{}] * len(plans)
    if args.json:
        stages = [
            show.to_dict(one) | ({"verified": found} if found else {}) for one, found in zip(plans, seen, strict=True)
        ]
        print(json.dumps({"assumed": show.assumptions(cluster), "open": notes, "stages": stages}, indent=1))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        show.print_assumptions(cluster, notes, console)
        for one, found in zip(plans, seen, strict=True):
            show.print_plan(one, console)
            if found:
                show.print_seen(found, console)
    return 0 if all(one.fits for one in plans) else 1


def verified(one: StagePlan) -> dict[str, tuple[float, float]]:
    """What -> (formula, seen), of one microbatch of one row (or pair) with the kernels of a CPU, which is where it runs."""
    import dataclasses

    import torch

    from adapt.plan.fake import fake_ranks, observe
    from adapt.plan.memory import moments

    setup, rows = dataclasses.replace(one.setup, device="cpu", offload=False), one.work.unit
    compute = torch.bfloat16 if setup.compute == 2 else torch.float32
    with fake_ranks(one.grid.ranks) as world:
        seen = observe(
            one.recipe, one.student.config, one.teacher and one.teacher.config, world, rows=rows, compute=compute
        )
    found: dict[str, tuple[float, float]] = {"parameters": (one.student.parameters(), seen.parameters)}
    for sent in one.sent:
        found[f"{sent.kind}s"] = (sent.count, seen.counts.get(sent.kind, 0))
        found[f"{sent.kind}, bytes"] = (sent.bytes, seen.bytes.get(sent.kind, 0))
    found["optimizer state, bytes"] = (one.optimizer.state, seen.state)
    if not seen.memory:
        return found
    of_one = moments(one.student, one.teacher, one.work, one.optimizer, setup, rows, accumulated=False)
    followed = [m.total - m.kinds["optimizer"] for m in of_one]
    found["memory without optimizer"] = (max(followed), seen.memory["Total"])
    return found
