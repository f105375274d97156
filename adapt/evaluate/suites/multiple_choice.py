"""Multiple choice by likelihood: the answer that the model finds most probable after the question.

    multiple_choice/<label>         accuracy by nats per byte of each answer, so that long answers have a chance
    multiple_choice/<label>/token   by nats per token
    multiple_choice/<label>/sum     by nats, not normalised

A question's record has `prompt`, `response` (the right answer) and `distractors` (the wrong ones). A tie is no answer.
The number of questions and the standard error of the accuracy go to the log.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

from adapt.components import SourceChoice, suites
from adapt.data.documents import Document
from adapt.errors import Problem, UserError
from adapt.evaluate.context import EvalContext
from adapt.evaluate.sources import answered, label_of, open_source, source_problems
from adapt.evaluate.suites.passkey import causal_problems

log = logging.getLogger("adapt.evaluate")


@dataclass(frozen=True, kw_only=True)
class MultipleChoiceConfig:
    source: SourceChoice
    """Questions with `prompt`, `response` and `distractors` (`{name: attack_questions, ...}`, `jsonl:FILE`)."""
    label: str | None = None
    """Name in metrics; null takes the source's."""
    limit: int | None = 200
    """Questions; null: all."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be 1 or more")

    def problems(self, recipe) -> Iterator[Problem]:
        yield from source_problems(self.source)
        yield from causal_problems("multiple_choice", recipe)

    def metrics(self, recipe, datasets: list[str]) -> list[str]:
        name = f"multiple_choice/{label_of(self.source, self.label)}"
        return [name, f"{name}/token", f"{name}/sum"]


class MultipleChoice:
    brings_data = True

    def __init__(self, config: MultipleChoiceConfig):
        self.config = config

    def __call__(self, context: EvalContext) -> dict[str, float]:
        from adapt.data.questions import Asker
        from adapt.evaluate.answers import answer_nats, mean, require_causal

        require_causal("multiple_choice", context)
        source, asker = open_source(self.config.source, context.tokenizer), Asker(context.tokenizer)
        documents = answered(source, self.config.limit, "multiple_choice")
        choices = [[d.response, *distractors(d)] for d in documents]
        questions = [asker(d.prompt, text, d.id) for d, texts in zip(documents, choices, strict=True) for text in texts]
        nats = iter(zip(answer_nats(context, questions), questions, strict=True))
        by_byte, by_token, plain = [], [], []
        for texts in choices:
            scores = [(next(nats), len(text.encode())) for text in texts]
            by_byte.append(first_is_best([n / size for (n, _), size in scores]))
            by_token.append(first_is_best([n / len(q.answer) for (n, q), _ in scores]))
            plain.append(first_is_best([n for (n, _), _ in scores]))
        name = f"multiple_choice/{self.config.label or source.label}"
        results = {name: mean(by_byte), f"{name}/token": mean(by_token), f"{name}/sum": mean(plain)}
        error = math.sqrt(results[name] * (1 - results[name]) / len(choices))
        chance = mean(1 / len(texts) for texts in choices)
        log.info(
            "%s: %d questions, %.3f ± %.3f (standard error) right, %.3f by chance",
            name, len(choices), results[name], error, chance,
        )  # fmt: skip
        return results


@suites.register("multiple_choice")
def multiple_choice(config: MultipleChoiceConfig) -> MultipleChoice:
    return MultipleChoice(config)


def first_is_best(nats: list[float]) -> float:
    """1 where the first has the fewest nats, and alone."""
    return float(all(nats[0] < other for other in nats[1:]))


def distractors(document: Document) -> list[str]:
    wrong = document.meta.get("distractors")
    if not wrong:
        raise UserError(
            f"suite multiple_choice: {document.id} has no wrong answers; records need `distractors`, a list of texts, "
            f"besides prompt and response"
        )
    if document.response in wrong:
        raise UserError(f"suite multiple_choice: {document.id} lists its right answer among the wrong ones")
    return list(wrong)
