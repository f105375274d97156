"""Whether the model finds the chosen answer of held-out preference pairs more likely than the rejected one.

    preference/<dataset>          share of the pairs with log p(chosen) > log p(rejected)
    preference_margin/<dataset>   mean of log p(chosen) - log p(rejected), nats
    chosen_nats/<dataset>         nats per token of the chosen answers, which training on preferences may well make rise

Log-probabilities are sums over the answer's tokens, its end included. What a margin has grown by since the start of a stage
is the mean margin of DPO's implicit reward there, divided by beta. Other suites leave preference pairs alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapt.components import suites
from adapt.errors import UserError
from adapt.evaluate.context import EvalContext, Suite

NAMES = ("preference", "preference_margin", "chosen_nats")


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    def metrics(self, recipe, datasets: list[str]) -> list[str]:
        return [f"{name}/{label}" for label in datasets for name in NAMES]


@suites.register("preference")
def preference(config: PreferenceConfig) -> Suite:
    return measure


def measure(context: EvalContext) -> dict[str, float]:
    from adapt.evaluate.likelihood import ar_nats

    if not context.pair_sets:
        raise UserError(
            "suite preference compares the answers of preference pairs, and no entry of data.eval has any; add one, or leave "
            "the suite out"
        )
    results = {}
    for label, batches in context.pair_sets.items():
        sums = dict.fromkeys(("right", "margin", "nats", "tokens", "pairs"), 0.0)
        for batch in batches():
            nats = context.call(ar_nats, batch, context.facts)
            real = batch.sample_index[::2] >= 0  # a rank with fewer pairs than others has rows of padding
            chosen, rejected = nats[::2][real], nats[1::2][real]
            sums["right"] += float((chosen < rejected).sum())
            sums["margin"] += float((rejected - chosen).sum())
            sums["nats"] += float(chosen.sum())
            sums["tokens"] += float((batch.labels[::2][real] != -100).sum())
            sums["pairs"] += float(real.sum())
        sums = context.reduce(sums)
        found = sums["right"] / sums["pairs"], sums["margin"] / sums["pairs"], sums["nats"] / sums["tokens"]
        results |= {f"{name}/{label}": value for name, value in zip(NAMES, found, strict=True)}
    return results
