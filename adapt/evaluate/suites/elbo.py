"""How well block diffusion explains held-out text: an upper bound on its nats, comparable with AR bits per byte.

    elbo/<dataset>/b<block size>       nats per token
    elbo_bpb/<dataset>/b<block size>   bits per byte

Given the blocks before, a block costs the evidence lower bound of its hidden tokens (masks drawn, weights 1 / p) and,
where decoding takes first tokens from the AR head, the AR cost of those. At block size 1 it is the AR likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from adapt.components import suites
from adapt.errors import Problem
from adapt.evaluate.context import EvalContext, Suite
from adapt.evaluate.suites.masked_ce import contract_at, ratio, size_name, size_problem


@dataclass(frozen=True, kw_only=True)
class ElboConfig:
    block_size: int | None = None
    """Block size to measure at; null takes the objective's (or the model's) target."""
    samples: int | None = 2
    """Draws of masks per row; null goes through all masks of every block (small blocks only)."""

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples={self.samples} must be 1 or more, or null for exact scoring")
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be 1 or more")

    def problems(self, recipe) -> Iterator[Problem]:
        from adapt.evaluate.likelihood import EXACT_AT_MOST

        yield from size_problem("elbo", self.block_size, recipe)
        size = self.block_size or getattr(recipe.objective.config, "block_size", None)
        if self.samples is None and size is not None and size > EXACT_AT_MOST:
            yield Problem(
                "", f"elbo goes through all 2^{size} masks with samples=null; give samples, or a smaller block"
            )

    def metrics(self, recipe, datasets: list[str]) -> list[str]:
        size = size_name(self.block_size, recipe)
        return [f"{what}/{label}/b{size}" for label in datasets for what in ("elbo", "elbo_bpb")]


@suites.register("elbo")
def elbo(config: ElboConfig) -> Suite:
    return lambda context: measure(config, context)


def measure(config: ElboConfig, context: EvalContext) -> dict[str, float]:
    from adapt.evaluate.likelihood import elbo_nats

    contract = contract_at("elbo", config.block_size, context)
    size = "doc" if contract.block_size is None else contract.block_size
    results = {}
    for label in context.datasets:
        sums = {"nats": 0.0, "tokens": 0.0, "bytes": 0.0}
        for batch in context.batches(label):

            def score(models, batch=batch):
                return elbo_nats(models, batch, contract, context.facts, samples=config.samples, seed=context.seed)

            sums["nats"] += float(context.call(score).sum())
            sums["tokens"] += int((batch.labels != -100).sum())
            sums["bytes"] += context.num_bytes(batch)
        sums = context.reduce(sums)
        results[f"elbo/{label}/b{size}"] = ratio(sums["nats"], sums["tokens"])
        results[f"elbo_bpb/{label}/b{size}"] = ratio(sums["nats"] / math.log(2), sums["bytes"])
    return results
