"""Masked cross-entropy under the condition of decoding: how well hidden tokens of a block are guessed.

Block-first tokens are visible (the AR head gives them), each other token is hidden with probability t,
earlier blocks are clean. Every hidden token weighs the same; the masks depend on the seed and the row alone,
so that two models, or one model at two times, are asked the same questions.

    masked_ce/<dataset>/b<block size>/t<t>   nats per hidden token
    masked_ce/<dataset>/b<block size>        mean over the t
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from adapt.components import suites
from adapt.errors import Problem, UserError
from adapt.evaluate.context import EvalContext, Suite
from adapt.generation.contract import Contract


@dataclass(frozen=True, kw_only=True)
class MaskedCeConfig:
    block_size: int | None = None
    """Block size to measure at; null takes the objective's (or the model's) target."""
    t: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Fractions of the tokens that are hidden; 1 hides all but the block-first ones."""

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(f"block_size={self.block_size}: a block of one hides nothing; give 2 or more")
        if not self.t or not all(0 < t <= 1 for t in self.t):
            raise ValueError(f"t={list(self.t)} must be one or more numbers in (0, 1]")

    def problems(self, recipe) -> Iterator[Problem]:
        yield from size_problem("masked_ce", self.block_size, recipe)

    def metrics(self, recipe, datasets: list[str]) -> list[str]:
        at = [f"masked_ce/{label}/b{size_name(self.block_size, recipe)}" for label in datasets]
        return [name for a in at for name in (*(f"{a}/t{t:g}" for t in self.t), a)]


@suites.register("masked_ce")
def masked_ce(config: MaskedCeConfig) -> Suite:
    return lambda context: measure(config, context)


def measure(config: MaskedCeConfig, context: EvalContext) -> dict[str, float]:
    from adapt.objectives.block_diffusion import fixed_t

    contract = contract_at("masked_ce", config.block_size, context)
    objectives = {t: fixed_t(contract, context.facts, t) for t in config.t}
    size = "doc" if contract.block_size is None else contract.block_size
    results = {}
    for label in context.datasets:
        sums = {f"{kind}/{t}": 0.0 for t in config.t for kind in ("nats", "tokens")}
        for batch in context.batches(label):
            for t, objective in objectives.items():
                prepared = objective.prepare(batch, seed=context.seed, step=0).to(context.device)
                sums[f"nats/{t}"] += float(context.call(objective, prepared.inputs)["masked"])
                sums[f"tokens/{t}"] += prepared.terms["masked"].count
        sums = context.reduce(sums)
        at_t = {t: ratio(sums[f"nats/{t}"], sums[f"tokens/{t}"]) for t in config.t}
        results |= {f"masked_ce/{label}/b{size}/t{t:g}": value for t, value in at_t.items()}
        results[f"masked_ce/{label}/b{size}"] = sum(at_t.values()) / len(at_t)
    return results


def size_name(own: int | None, recipe) -> int | str:
    """The block size as metrics name it, by the suite's own and the objective's."""
    size = getattr(recipe.objective.config, "block_size", None) if own is None else own
    return "doc" if size is None else size


def size_problem(suite: str, own: int | None, recipe) -> Iterator[Problem]:
    if own is None and not hasattr(recipe.objective.config, "block_size"):
        yield Problem(
            "",
            f"{suite} needs a block size, and the objective {recipe.objective.name!r} has none: write "
            f"{{name: {suite}, block_size: 8}}",
        )


def ratio(nats: float, tokens: float) -> float:
    return nats / tokens if tokens else math.nan


def contract_at(suite: str, own: int | None, context: EvalContext) -> Contract:
    """The context's contract at the suite's own block size, where it has one; a letter where there is none at all, or
    no mask token."""
    contract = context.contract if own is None else replace(context.contract, block_size=own)
    if contract.block_size is None and contract.context_mask != "document":
        raise UserError(
            f"suite {suite} needs a block size, and neither objective nor model states one: "
            f"give it in the recipe, {{name: {suite}, block_size: 8}}"
        )
    if context.facts.mask_token_id is None:
        raise UserError(
            f"suite {suite} needs a mask token, and the model's config states none (mask_token_id): it measures "
            f"block-diffusion models only; leave it out of the suites"
        )
    return contract
