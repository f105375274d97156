"""Negative log-likelihood by the number of tokens before: what a model makes of longer texts than it was trained on.

    nll_by_position/<dataset>/<from>-<to>   nats per scored token with at least <from> and fewer than <to> tokens before it;
                                            the first and the last such part of a row

and of each model to `compare` with, measured once (adapt/evaluate/others.py). The report draws all parts as curves: a model
that makes use of what it has read falls, one whose state is full stays, one that is lost beyond its training length rises.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from adapt.components import suites
from adapt.errors import Problem, UserError
from adapt.evaluate.context import EvalContext
from adapt.evaluate.grid import Grid
from adapt.evaluate.others import Other, compare_problems, others
from adapt.evaluate.suites.passkey import length_problems

if TYPE_CHECKING:
    from adapt.data.batch import Batch

UNIT = "nats per token"


@dataclass(frozen=True, kw_only=True)
class NllByPositionConfig:
    length: int = 1024
    """Tokens of a row; `evaluation.limit` rows of each held-out set are read."""
    parts: int = 8
    """Parts of a row that are averaged over, of equal length."""
    documents: Literal["joined", "apart"] = "joined"
    """`joined`: the documents of a row are one text, so that there are long ones whatever the data. `apart`: none sees
    another, and positions are those in the document."""
    compare: tuple[Other, ...] = ()
    """Models measured beside the student: `teacher`, the base before conversions; `window`, the same with no more memory
    than the student's recurrent state."""

    def __post_init__(self) -> None:
        if not 1 <= self.parts <= self.length:
            raise ValueError(f"parts={self.parts} must be from 1 to the {self.length:,d} tokens of a row (length)")

    @property
    def edges(self) -> list[int]:
        return [i * self.length // self.parts for i in range(self.parts + 1)]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{a}-{b}" for a, b in zip(self.edges, self.edges[1:], strict=False))

    def problems(self, recipe) -> Iterator[Problem]:
        yield from length_problems("nll_by_position", (self.length,), recipe)
        yield from compare_problems("nll_by_position", self.compare, recipe)

    def metrics(self, recipe, datasets: list[str]) -> list[str]:
        """The student's: what is measured once is nothing for rules."""
        ends = dict.fromkeys((self.names[0], self.names[-1]))
        return [f"nll_by_position/{label}/{name}" for label in datasets for name in ends]


class NllByPosition:
    def __init__(self, config: NllByPositionConfig):
        self.config = config

    def __call__(self, context: EvalContext) -> dict[str, float]:
        from adapt.evaluate.answers import require_causal

        require_causal("nll_by_position", context)
        results = self.measure(context)
        for name, title, other in others(context, self.config.compare, repr(self.config)):
            results |= self.measure(other, f"_{name}", title)
        return results

    def measure(self, context: EvalContext, suffix: str = "", model: str = "") -> dict[str, float]:
        config, results, cells, fewest = self.config, {}, [], math.inf
        check_positions(context, config.length)
        for label in context.datasets:
            sums = {f"{what}{part}": 0.0 for what in ("nats", "tokens") for part in range(config.parts)}
            for batch in context.long_batches(label, config.length, config.documents == "joined"):
                for part, nats in zip(*context.call(by_part, batch, config.edges, context.facts), strict=True):
                    sums[f"nats{part}"] += nats
                    sums[f"tokens{part}"] += 1
            sums = context.reduce(sums)
            means = [sums[f"nats{p}"] / n if (n := sums[f"tokens{p}"]) else None for p in range(config.parts)]
            fewest = min(fewest, *(sums[f"tokens{p}"] for p in range(config.parts)))
            cells.append(tuple(means))
            ends = {config.names[0]: means[0], config.names[-1]: means[-1]}
            results |= {
                f"nll_by_position{suffix}/{label}/{name}": math.nan if mean is None else mean
                for name, mean in ends.items()
            }
        context.keep(
            Grid(
                suite="nll_by_position",
                model=model,
                unit=UNIT,
                rows=tuple(context.datasets),
                columns=config.names,
                row_title="held-out set",
                column_title="tokens before",
                cells=tuple(cells),
                trials=int(fewest),
            )
        )
        return results


@suites.register("nll_by_position")
def nll_by_position(config: NllByPositionConfig) -> NllByPosition:
    return NllByPosition(config)


def by_part(models: Any, batch: Batch, edges: list[int], facts: Any) -> tuple[list[int], list[float]]:
    """(part of the row by the tokens before it, nats) of each scored token."""
    import torch

    from adapt.evaluate.likelihood import ar_token_nats
    from adapt.objectives.base import Targets

    targets = Targets.of(batch)
    nats = ar_token_nats(models, batch, targets, facts).double().cpu()
    before = batch.position_ids[targets.row, targets.col].cpu()
    part = torch.bucketize(before, torch.tensor(edges[1:]), right=True)
    return part.tolist(), nats.tolist()


def check_positions(context: EvalContext, length: int) -> None:
    limit = context.call(lambda models: getattr(models.student.config, "max_position_embeddings", None))
    if limit is not None and length > limit:
        raise UserError(
            f"suite nll_by_position: rows of {length:,d} tokens do not fit into the model's context of {limit:,d} "
            f"(max_position_embeddings): give a smaller `length`"
        )
