"""How far back each recurrent layer remembers, on held-out text.

    log2_half_life   mean over layers, tokens, heads and channels of log2 of the tokens after which half is forgotten

The report draws, for each layer, how these half-lives are spread over tokens, heads and channels: a layer recalls no
further than its longest ones reach, which the mean does not show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapt.components import suites
from adapt.errors import Problem
from adapt.evaluate.context import EvalContext
from adapt.evaluate.grid import Grid

if TYPE_CHECKING:
    from adapt.data.batch import Batch

UNIT = "% of channels"
FOREVER = 1e-9
"""Log decays nearer to 0 than this count as this: a half-life of 7e8 tokens."""


@dataclass(frozen=True, kw_only=True)
class HalfLivesConfig:
    longest: int = 65536
    """Tokens from which half-lives are counted together; a power of 2. Parts double from 1 to here."""

    def __post_init__(self) -> None:
        if self.longest < 2 or self.longest & (self.longest - 1):
            raise ValueError(f"longest={self.longest} must be a power of 2; 65536 is usual")

    @property
    def edges(self) -> list[int]:
        """log2 of where parts begin, after the first."""
        return list(range(self.longest.bit_length()))

    def problems(self, recipe) -> Iterator[Problem]:
        from adapt.evaluate.ablated import recurrent_problems

        yield from recurrent_problems("half_lives", recipe)

    def metrics(self, recipe, datasets: list[str]) -> list[str]:
        return ["log2_half_life"]


class HalfLives:
    def __init__(self, config: HalfLivesConfig):
        self.config = config

    def __call__(self, context: EvalContext) -> dict[str, float]:
        from adapt.evaluate.ablated import recurrent

        edges = self.config.edges
        layers = [i for i, _ in recurrent(context.call(lambda models: models.student))]
        sums = {f"{i}/{part}": 0.0 for i in layers for part in (*range(len(edges) + 1), "log2")}
        for label in context.datasets:
            for batch in context.batches(label):
                for i, (counts, log2) in context.call(spread, batch, edges, context.facts).items():
                    sums[f"{i}/log2"] += log2
                    for part, count in enumerate(counts):
                        sums[f"{i}/{part}"] += count
        sums = context.reduce(sums)
        counts = {i: [sums[f"{i}/{part}"] for part in range(len(edges) + 1)] for i in layers}
        totals = {i: sum(c) for i, c in counts.items()}
        context.keep(
            Grid(
                suite="half_lives",
                unit=UNIT,
                rows=tuple(f"{i:02d}" for i in layers),
                columns=("<1", *(f"{2**e}" for e in edges)),
                row_title="layer",
                column_title="half-life, from so many tokens",
                cells=tuple(tuple(c / totals[i] if totals[i] else None for c in counts[i]) for i in layers),
                trials=int(min(totals.values())),
            )
        )
        whole = sum(totals.values())
        return {"log2_half_life": sum(sums[f"{i}/log2"] for i in layers) / whole if whole else math.nan}


@suites.register("half_lives")
def half_lives(config: HalfLivesConfig) -> HalfLives:
    return HalfLives(config)


def spread(models: Any, batch: Batch, edges: list[int], facts: Any) -> dict[int, tuple[list[int], float]]:
    """Layer -> (counts of the parts, sum of log2 half-lives) over the batch's real tokens, all heads and channels."""
    import torch

    from adapt.data.batch import PAD
    from adapt.evaluate.ablated import recurrent
    from adapt.generation.rows import device_of
    from adapt.models import attention
    from adapt.models.layout import Layout

    student, found = models.student, {}
    device = device_of(student)
    real = (batch.role != PAD).to(device)
    bounds = torch.tensor(edges, device=device, dtype=torch.float64)

    def watch(layer: int):
        def look(recurrence, args) -> None:
            log_decays = recurrence.log_decays(args[0]).double().clamp(max=-FOREVER)  # [B, H, S, channels]
            log2 = (-math.log(2) / log_decays).log2().transpose(1, 2)[real]
            counts = torch.bincount(torch.bucketize(log2.flatten(), bounds, right=True), minlength=len(edges) + 1)
            found[layer] = (counts.tolist(), float(log2.sum()))

        return look

    handles = [mixer.recurrence.register_forward_pre_hook(watch(i)) for i, mixer in recurrent(student)]
    layout = Layout.causal(batch.doc_ids, batch.position_ids).to(device)
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled layers do not see hooks that came later
            attention.hidden_states(
                student, batch.input_ids.to(device), batch.position_ids.to(device), layout, facts.attention
            )
    finally:
        for handle in handles:
            handle.remove()
    return found
