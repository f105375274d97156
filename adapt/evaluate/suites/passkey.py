"""Passkey retrieval: a five-digit number hidden in filler, by length of the text and depth of the number.

    passkey/<length>       fraction of keys decoded exactly, greedily
    passkey                mean over the lengths
    passkey_nll/<length>   nats per token of the key, which tells weak models apart where all of them find nothing
    passkey_nll            mean over the lengths

and of each model to `compare` with, measured once: passkey_teacher/<length>, passkey_nll_window/<length>, and so on
(adapt/evaluate/others.py).

The length is that of a training row of the task (source `passkey`): prompt, key, and what ends it. Keys are of the held-
out half of the range, the same at every evaluation with one seed. The report draws length x depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from adapt.components import suites
from adapt.errors import Problem
from adapt.evaluate.context import EvalContext
from adapt.evaluate.grid import Grid, depth_names
from adapt.evaluate.others import Other, compare_problems, others

if TYPE_CHECKING:
    from adapt.data.questions import Question

SALT = 1
Cells = list[tuple[int, int]]
"""(length, part of the depth) of each trial."""


@dataclass(frozen=True, kw_only=True)
class PasskeyConfig:
    lengths: tuple[int, ...] = (256, 512, 1024)
    """Lengths of the texts in tokens."""
    depths: int = 5
    """Equal parts of the text; a key stands anywhere in its part. 10 is the full grid."""
    trials: int = 4
    """Texts of each length and depth. 20 is the full grid."""
    prompt: Literal["trained", "plain"] = "trained"
    """`trained`: as training rows have it, a user's turn where the tokenizer has a chat template. `plain`: as text to go
    on with, for chat models that have not been trained on the task and would answer in a sentence."""
    compare: tuple[Other, ...] = ()
    """Models measured beside the student: `teacher`, the base before conversions; `window`, the same with no more memory
    than the student's recurrent state."""

    def __post_init__(self) -> None:
        check_grid(self)

    def problems(self, recipe) -> Iterator[Problem]:
        yield from length_problems("passkey", self.lengths, recipe)
        yield from compare_problems("passkey", self.compare, recipe)

    def metrics(self, recipe, datasets: list[str]) -> list[str]:
        """The student's: what is measured once is nothing for rules."""
        return [m for what in ("passkey", "passkey_nll") for m in (*(f"{what}/{n}" for n in self.lengths), what)]


class Passkey:
    brings_data = True

    def __init__(self, config: PasskeyConfig):
        self.config = config

    def __call__(self, context: EvalContext) -> dict[str, float]:
        questions, cells = passkeys(self.config, context)
        results = self.measure(context, questions, cells)
        for name, title, other in others(context, self.config.compare, repr(self.config)):
            results |= self.measure(other, questions, cells, f"_{name}", title)
        return results

    def measure(
        self, context: EvalContext, questions: list[Question], cells: Cells, suffix: str = "", model: str = ""
    ) -> dict[str, float]:
        from adapt.evaluate.answers import answer_nats, greedy

        decoded = greedy(context, [q.prompt for q in questions], [len(q.answer) for q in questions])
        right = [float(tokens == q.answer) for tokens, q in zip(decoded, questions, strict=True)]
        nats = [n / len(q.answer) for n, q in zip(answer_nats(context, questions), questions, strict=True)]
        context.keep(grid_of("passkey", self.config, cells, right, model))
        return by_length(f"passkey{suffix}", right, cells) | by_length(f"passkey_nll{suffix}", nats, cells)


@suites.register("passkey")
def passkey(config: PasskeyConfig) -> Passkey:
    return Passkey(config)


def passkeys(config, context: EvalContext) -> tuple[list[Question], Cells]:
    """Questions for keys of the held-out half, `trials` for each of `lengths` and `depths`: the same for all models."""
    from adapt.data.needles import Passkeys, as_answer, key_of, trial_rng
    from adapt.data.questions import Asker
    from adapt.evaluate.answers import require_causal

    require_causal("passkey", context)
    asker = Asker(context.tokenizer, plain=config.prompt == "plain")
    generate, questions, cells = Passkeys(asker.count), [], []
    for length in config.lengths:
        for part in range(config.depths):
            for number in range(config.trials):
                rng = trial_rng(context.seed, SALT, length, part, number)
                key = key_of(rng, "held-out")
                depth = (part + float(rng.random())) / config.depths
                answer = as_answer(str(key), asker.chat)
                questions.append(asker(generate(length, depth, key, answer).prompt, answer))
                cells.append((length, part))
    return questions, cells


def by_length(name: str, values: list[float], cells: Cells) -> dict[str, float]:
    """Means of the values of each length, and the mean of those."""
    from adapt.evaluate.answers import mean

    lengths = dict.fromkeys(n for n, _ in cells)
    found = {n: mean(v for v, (m, _) in zip(values, cells, strict=True) if m == n) for n in lengths}
    return {f"{name}/{n}": value for n, value in found.items()} | {name: mean(found.values())}


def grid_of(suite: str, config, cells: Cells, values: list[float], model: str = "") -> Grid:
    """Means of the values by (length, part of the depth)."""
    sums: dict[tuple[int, int], list[float]] = {}
    for cell, value in zip(cells, values, strict=True):
        sums.setdefault(cell, []).append(value)
    means = [
        [sum(v) / len(v) if (v := sums.get((n, d))) else None for d in range(config.depths)] for n in config.lengths
    ]
    return Grid(
        suite=suite,
        model=model,
        rows=tuple(map(str, config.lengths)),
        columns=depth_names(config.depths),
        cells=tuple(map(tuple, means)),
        trials=config.trials,
    )


def check_grid(config) -> None:
    if not config.lengths or len(set(config.lengths)) < len(config.lengths) or min(config.lengths) < 1:
        raise ValueError(f"lengths={list(config.lengths)} must be one or more different numbers of tokens")
    for key in ("depths", "trials"):
        if getattr(config, key) < 1:
            raise ValueError(f"{key}={getattr(config, key)} must be 1 or more")


def length_problems(suite: str, lengths: tuple[int, ...], recipe) -> Iterator[Problem]:
    """Longer than the model's context, where the recipe states it."""
    limit = (recipe.model.arch or {}).get("max_position_embeddings")
    if limit is not None and max(lengths) > limit:
        yield Problem(
            "", f"{suite} asks about texts of {max(lengths):,d} tokens, and the model's context is {limit:,d}: leave "
            f"the longer ones out of `lengths`"
        )  # fmt: skip
    yield from causal_problems(suite, recipe)


def causal_problems(suite: str, recipe) -> Iterator[Problem]:
    """Objectives whose models do not read from left to right."""
    own = recipe.objective.config
    seen = "document" if getattr(own, "block_size", 1) is None else getattr(own, "context", "causal")
    if seen != "causal":
        yield Problem(
            "", f"{suite} reads and writes from left to right, and the objective trains a context that is not causal "
            f"({seen}): leave the suite out"
        )  # fmt: skip
