"""Autoregressive bits per byte of held-out text: survives a change of tokenizer.

    bpb/<dataset>      nats of all scored tokens / ln 2 / bytes of their text
    ar_loss/<dataset>  nats per scored token

and of every held-out set marked `guard`, in a run or compared with one:

    forgetting/<dataset>   bits per byte above those at step 0 (0 there)
    forgetting/worst       the largest of them

Document ends are scored too (their nats count, their 0 bytes do not): knowing where a text stops is part of
knowing the text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from adapt.components import suites
from adapt.evaluate.context import EvalContext, Suite, guard_labels


@dataclass(frozen=True, kw_only=True)
class BpbConfig:
    def metrics(self, recipe, datasets: list[str]) -> list[str]:
        guards = guard_labels(recipe.data, datasets)
        names = [f"{what}/{label}" for label in datasets for what in ("bpb", "ar_loss")]
        return names + [f"forgetting/{label}" for label in (*guards, *(["worst"] if guards else []))]


@suites.register("bpb")
def bpb(config: BpbConfig) -> Suite:
    return measure


def measure(context: EvalContext) -> dict[str, float]:
    results = {}
    for label in context.datasets:
        sums = nats_and_bytes(context, label)
        results[f"bpb/{label}"] = per_byte(sums)
        results[f"ar_loss/{label}"] = sums["nats"] / sums["tokens"] if sums["tokens"] else math.nan
    return results | forgetting(context, results)


def nats_and_bytes(context: EvalContext, label: str, row_bytes: int | None = None) -> dict[str, float]:
    """Sums over the held-out rows: `nats`, `tokens` that were scored, and `bytes` of their text."""
    from adapt.objectives.next_token import NextToken

    objective = NextToken(context.facts)
    sums = {"nats": 0.0, "tokens": 0.0, "bytes": 0.0}
    for batch in context.batches(label, row_bytes):
        prepared = objective.prepare(batch, seed=context.seed, step=0).to(context.device)
        sums["nats"] += sum(float(s) for s in context.call(objective, prepared.inputs).values())
        sums["tokens"] += sum(term.count for term in prepared.terms.values())
        sums["bytes"] += context.num_bytes(batch)
    return context.reduce(sums)


def per_byte(sums: dict[str, float]) -> float:
    return sums["nats"] / math.log(2) / sums["bytes"] if sums["bytes"] else math.nan


def forgetting(context: EvalContext, results: dict[str, float]) -> dict[str, float]:
    risen = {label: context.forgotten(f"bpb/{label}", results[f"bpb/{label}"]) for label in context.guards}
    found = {f"forgetting/{label}": value for label, value in risen.items() if value is not None}
    return found | ({"forgetting/worst": max(found.values())} if found else {})
