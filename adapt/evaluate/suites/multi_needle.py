"""Several needles in one haystack: one of them is asked for among the others (RULER's multi-key), or all are
(multi-query).

    multi_needle_<one|all>/<length>   fraction of the values asked for that the answer contains
    multi_needle_<one|all>            mean over the lengths

In the grid of the report a value counts where its needle stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from adapt.components import SourceChoice, suites
from adapt.errors import Problem
from adapt.evaluate.context import EvalContext
from adapt.evaluate.suites.niah import Writer, check_needles, decoded_texts, essay_problems, essay_text
from adapt.evaluate.suites.passkey import check_grid, grid_of, length_problems

SALT = 3


@dataclass(frozen=True, kw_only=True)
class MultiNeedleConfig:
    ask: Literal["one", "all"] = "all"
    """Which of the needles the question is about."""
    needles: int = 4
    """Needles in a text, each with a key of its own."""
    haystack: Literal["noise", "essays"] = "noise"
    """What they are hidden in."""
    essays: SourceChoice | None = None
    """Long texts for `haystack: essays`; null takes the recipe's held-out data (`data.eval`)."""
    values: Literal["number", "uuid"] = "number"
    """7-digit numbers, or UUIDs."""
    lengths: tuple[int, ...] = (512, 1024)
    """Tokens of a prompt and of what is decoded after it."""
    depths: int = 10
    """Equal parts of the text."""
    trials: int = 20
    """Texts of each length and depth; the needle asked for (with `all`, the first) stands in that part, the others anywhere."""
    new_tokens: int = 128
    """Tokens decoded per text; the values may stand anywhere in them."""

    def __post_init__(self) -> None:
        check_grid(self)
        check_needles(self)
        if self.needles < 2:
            raise ValueError(f"needles={self.needles} must be 2 or more; the suite niah has one")

    def problems(self, recipe) -> Iterator[Problem]:
        yield from length_problems("multi_needle", self.lengths, recipe)
        yield from essay_problems("multi_needle", self.haystack == "essays", self.essays, recipe)

    def metrics(self, recipe, datasets: list[str]) -> list[str]:
        name = f"multi_needle_{self.ask}"
        return [*(f"{name}/{n}" for n in self.lengths), name]


class MultiNeedle:
    brings_data = True

    def __init__(self, config: MultiNeedleConfig):
        self.config = config

    def __call__(self, context: EvalContext) -> dict[str, float]:
        from adapt.data.needles import Haystack, draw_needles, trial_rng
        from adapt.evaluate.answers import mean

        config = self.config
        noise = config.haystack == "noise"
        haystack = Haystack.noise() if noise else Haystack.essays(essay_text(config.essays, context))
        writer = Writer("multi_needle", context, haystack, config.values, config.new_tokens)
        trials, lengths = [], []
        for length in config.lengths:
            for part in range(config.depths):
                for number in range(config.trials):
                    rng = trial_rng(context.seed, SALT, length, part, number)
                    others = rng.integers(config.depths, size=config.needles - 1).tolist()
                    needles = draw_needles(rng, haystack, config.values, [part, *others], config.depths)
                    trials.append(writer(needles, needles if config.ask == "all" else needles[:1], length))
                    lengths.append(length)
        questions = [writer.asker(trial.prompt, trial.answers[0]) for trial in trials]
        texts = decoded_texts(context, questions, config.new_tokens)
        found = [
            (length, depth, float(value in text))
            for length, trial, text in zip(lengths, trials, texts, strict=True)
            for value, depth in zip(trial.answers, trial.depths, strict=True)
        ]
        name = f"multi_needle_{config.ask}"
        cells = [(length, min(int(depth * config.depths), config.depths - 1)) for length, depth, _ in found]
        context.keep(grid_of(name, config, cells, [right for *_, right in found]))
        by_length = {n: mean(right for m, _, right in found if m == n) for n in config.lengths}
        return {f"{name}/{n}": value for n, value in by_length.items()} | {name: mean(by_length.values())}


@suites.register("multi_needle")
def multi_needle(config: MultiNeedleConfig) -> MultiNeedle:
    return MultiNeedle(config)
