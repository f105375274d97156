"""One optimizer step, read straight down: batch, counts over all ranks, forward and backward of every microbatch with
one divisor known in advance, clip, update. No formula of any objective is here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapt.data.batch import Batch
from adapt.data.noise import generator
from adapt.distributed.world import World
from adapt.objectives.base import Objective


@dataclass(frozen=True)
class StepResult:
    sums: dict[str, Tensor]
    """Term -> sum over the targets of all ranks (device scalar)."""
    counts: dict[str, int]
    """Term -> what its sum is divided by, over all ranks and microbatches."""
    targets: dict[str, int]
    """Term -> targets in its sum, over all ranks and microbatches."""
    weights: dict[str, float]
    grad_norm: Tensor
    """Global norm before clipping (device scalar)."""
    finite: bool
    """Whether every term's sum and the gradient are: an infinite loss may well have a finite gradient."""
    info: dict[str, float]
    stop: bool
    """Whether any rank was asked to stop."""
    save: bool
    """Whether any rank wants a checkpoint behind this step."""


def gradients(
    root: nn.Module,
    objective: Objective,
    batch: Batch,
    *,
    microbatch: int,
    seed: int,
    step: int,
    world: World,
    clip: float | None,
    backward: Callable[[Tensor], None] = Tensor.backward,
    clear: Callable[[], None] = lambda: None,
    stop: bool = False,
    save: bool = False,
) -> StepResult:
    """Leave the clipped gradients of one step in the parameters. `batch` is this rank's share of the step; `clear`
    takes out what is no gradient of this stage, before the norm."""
    rows = range(0, batch.num_rows, microbatch)
    prepared = [objective.prepare(batch.rows(i, i + microbatch), seed=seed, step=step) for i in rows]
    names = list(prepared[0].terms)
    terms = [[p.terms[n] for p in prepared] for n in names]
    local = [sum(t.count for t in term) for term in terms]
    shown = [sum(t.count if t.targets is None else t.targets for t in term) for term in terms]
    *counts, stopping, saving = world.sum([*local, *shown, int(stop), int(save)])
    totals = dict(zip(names, counts[: len(names)], strict=True))
    targets = dict(zip(names, counts[len(names) :], strict=True))
    weights = {n: prepared[0].terms[n].weight for n in names}

    torch.manual_seed(int(generator(seed, 1, step, world.rank).integers(2**62)))  # dropout: nothing to save
    sums = {n: torch.zeros((), device=world.device) for n in names}
    for item in prepared:  # each reduces its gradients: kept back, they would be whole on every rank
        found = root(objective, item.to(world.device).inputs)
        loss = sum(weights[n] / max(1, totals[n]) * found[n] for n in names)
        backward(loss * world.size)  # FSDP averages over ranks; the divisor is already global
        for n in names:
            sums[n] += found[n].detach().to(sums[n].dtype)
    clear()
    norm = clip_gradients(root, clip)
    whole = world.add_up(torch.stack([sums[n] for n in names]))
    finite = torch.isfinite(whole).all() & torch.isfinite(norm)
    info = {k: sum(p.info[k] for p in prepared) / len(prepared) for k in prepared[0].info}
    sums = dict(zip(names, whole, strict=True))
    return StepResult(sums, totals, targets, weights, norm, bool(finite), info, bool(stopping), bool(saving))


def clip_gradients(root: nn.Module, limit: float | None) -> Tensor:
    """Global gradient norm over all ranks; gradients are scaled down to `limit` where they exceed it."""
    parameters = [p for p in root.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def not_finite(result: StepResult) -> str:
    """Which part of it is not finite, in words."""
    bad = [n for n, s in result.sums.items() if not math.isfinite(float(s))]
    what = f"loss term {', '.join(bad)}" if bad else "gradient"
    return f"the {what} is not finite (gradient norm {float(result.grad_norm)})"


def loss_values(result: StepResult) -> dict[str, float]:
    """Logged values: `loss`, and `loss/<term>` (each a mean over its targets; a term without any has none)."""
    sums = {n: float(s) for n, s in result.sums.items()}
    return {
        "loss": sum(result.weights[n] * s / max(1, result.counts[n]) for n, s in sums.items()),
        **{f"loss/{n}": s / result.targets[n] for n, s in sums.items() if result.targets[n]},
    }
