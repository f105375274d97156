"""The interval of t in which a block's loss varies least (BD3-LM, arXiv 2503.09573, section 5.3): training there has the
least noisy gradients. With `objective.noise.search` training takes it over.

    noise_interval/low, /high   the interval
    noise_interval/variance     variance of a block's weighted loss in it
    noise_interval/full         the same for t in (0, 1]

BD3-LM evaluates every interval anew. Here blocks of all t are scored once, their losses sorted into bins of t, and each
interval's variance put together from the moments of its bins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from adapt.components import suites
from adapt.data.batch import Batch
from adapt.errors import Problem
from adapt.evaluate.context import EvalContext, Suite
from adapt.evaluate.suites.masked_ce import contract_at, size_problem
from adapt.generation.contract import Contract

BINS = 20


@dataclass(frozen=True, kw_only=True)
class NoiseIntervalConfig:
    block_size: int | None = None
    """Block size to measure at; null takes the objective's (or the model's) target."""
    widths: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    """Widths of the intervals tried, each from every start at multiples of 0.05."""

    def __post_init__(self) -> None:
        if not self.widths or not all(1 / BINS <= w <= 1 for w in self.widths):
            raise ValueError(f"widths={list(self.widths)} must be one or more numbers from {1 / BINS} to 1")

    def problems(self, recipe) -> Iterator[Problem]:
        yield from size_problem("noise_interval", self.block_size, recipe)

    def metrics(self, recipe, datasets: list[str]) -> list[str]:
        return [f"noise_interval/{what}" for what in ("low", "high", "variance", "full")]


@suites.register("noise_interval")
def noise_interval(config: NoiseIntervalConfig) -> Suite:
    return lambda context: measure(config, context)


def measure(config: NoiseIntervalConfig, context: EvalContext) -> dict[str, float]:
    contract = contract_at("noise_interval", config.block_size, context)
    sums = {f"{kind}{bin}": 0.0 for kind in ("n", "x", "xx") for bin in range(BINS)}
    for label in context.datasets:
        for batch in context.batches(label):
            for bin, loss in zip(*block_losses(context, contract, batch), strict=True):
                for kind, value in (("n", 1.0), ("x", loss), ("xx", loss * loss)):
                    sums[f"{kind}{bin}"] += value
    sums = context.reduce(sums)
    moments = [(sums[f"x{b}"] / n, sums[f"xx{b}"] / n) if (n := sums[f"n{b}"]) else None for b in range(BINS)]
    found = {
        (start / BINS, (start + width) / BINS): spread
        for width in {round(w * BINS) for w in config.widths}
        for start in range(BINS - width + 1)
        if (spread := variance(moments[start : start + width])) is not None
    }
    if not found:
        return {}
    (low, high), least = min(found.items(), key=lambda item: (item[1], item[0]))
    full = variance(moments)
    return {
        "noise_interval/low": low,
        "noise_interval/high": high,
        "noise_interval/variance": least,
        "noise_interval/full": math.nan if full is None else full,
    }


def variance(moments: list[tuple[float, float] | None]) -> float | None:
    """Of t uniform over the bins; None where a bin was never drawn."""
    if any(m is None for m in moments):
        return None
    mean = sum(x for x, _ in moments) / len(moments)
    return sum(xx for _, xx in moments) / len(moments) - mean * mean


def block_losses(context: EvalContext, contract: Contract, batch: Batch) -> tuple[list[int], list[float]]:
    """Bin of t and weighted loss of every block with something to hide."""
    from adapt.objectives.block_diffusion import BlockDiffusion, as_decoded
    from adapt.objectives.blocks import Blocks
    from adapt.objectives.masking import Noise, draw

    objective = BlockDiffusion(as_decoded(contract), context.facts)
    blocks = Blocks.of(batch, contract.block_size, objective.config.phase, context.seed)
    hideable = objective.hideable(batch, blocks)
    mask = draw(batch, blocks, hideable, Noise(), context.seed)
    prepared = objective.lay_out(batch, blocks, [mask], size=contract.block_size)
    nats = context.call(objective.token_nats, prepared.to(context.device).inputs).double().cpu()
    losses = torch.zeros(batch.input_ids.shape, dtype=torch.float64)
    losses[mask.hidden] = nats / mask.probability[mask.hidden]
    block = blocks.number + blocks.number.shape[1] * torch.arange(batch.num_rows)[:, None]
    _, index = block[hideable].unique(return_inverse=True)
    count = int(index.max()) + 1 if len(index) else 0
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, index, losses[hideable])
    t = torch.zeros(count).index_copy_(0, index, mask.probability[hideable])  # the same for all of a block
    return (t * BINS).long().clamp(max=BINS - 1).tolist(), total.tolist()
