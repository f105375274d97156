"""Word problems: greedy decoding from the prompt, and the number it comes to against the reference's.

    exact_match/<label>   fraction of answers whose number equals the reference's
    answer_loss/<label>   nats per token of the reference answers, which moves long before the first problem is solved

Prompts are tokenised as the trainer does: through the chat template where the tokenizer has one. The number is the one
after `####` (GSM8K's form), else the last one of the text; `pattern` finds others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from adapt.components import SourceChoice, suites
from adapt.errors import Problem, UserError
from adapt.evaluate.context import EvalContext
from adapt.evaluate.sources import answered, label_of, open_source, source_problems
from adapt.evaluate.suites.passkey import causal_problems

NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+"
FINAL = re.compile(rf"####\s*\$?({NUMBER})")
ANY = re.compile(f"({NUMBER})")


@dataclass(frozen=True, kw_only=True)
class ExactMatchConfig:
    source: SourceChoice
    """Questions with worked answers, held out of training (`{name: arithmetic, split: held-out}`, `hub:openai/gsm8k`)."""
    label: str | None = None
    """Name in metrics; null takes the source's."""
    limit: int | None = 40
    """Questions; null: all."""
    max_new_tokens: int = 256
    """Tokens decoded per question at most."""
    pattern: str | None = None
    """Regular expression whose first group is the number; null: after `####`, else the last number of the text."""

    def __post_init__(self) -> None:
        for key in ("limit", "max_new_tokens"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"{key}={value} must be 1 or more")
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"pattern={self.pattern!r} is no regular expression: {error}") from None
            if groups < 1:
                raise ValueError(f"pattern={self.pattern!r} has no group; put the number's part into parentheses")

    def problems(self, recipe) -> Iterator[Problem]:
        yield from source_problems(self.source)
        yield from causal_problems("exact_match", recipe)

    def metrics(self, recipe, datasets: list[str]) -> list[str]:
        label = label_of(self.source, self.label)
        return [f"exact_match/{label}", f"answer_loss/{label}"]


class ExactMatch:
    brings_data = True

    def __init__(self, config: ExactMatchConfig):
        self.config = config

    def __call__(self, context: EvalContext) -> dict[str, float]:
        from adapt.data.questions import Asker
        from adapt.evaluate.answers import answer_nats, ends, greedy, mean, require_causal

        require_causal("exact_match", context)
        config, asker = self.config, Asker(context.tokenizer)
        source = open_source(config.source, context.tokenizer)
        documents = answered(source, config.limit, "exact_match")
        wanted = [number(d.response, config.pattern) for d in documents]
        if None in wanted:
            at = documents[wanted.index(None)]
            raise UserError(
                f"suite exact_match: the answer of {at.id} has no number in it: {at.response[-80:]!r}; `pattern` says "
                f"where numbers stand"
            )
        questions = [asker(d.prompt, d.response, d.id) for d in documents]
        stop = ends(context, questions)
        rows = greedy(context, [q.prompt for q in questions], [config.max_new_tokens] * len(questions), stop)
        texts = [context.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        right = [float(number(t, config.pattern) == w) for t, w in zip(texts, wanted, strict=True)]
        nats, label = answer_nats(context, questions), config.label or source.label
        return {
            f"exact_match/{label}": mean(right),
            f"answer_loss/{label}": sum(nats) / sum(len(q.answer) for q in questions),
        }


@suites.register("exact_match")
def exact_match(config: ExactMatchConfig) -> ExactMatch:
    return ExactMatch(config)


def number(text: str, pattern: str | None = None) -> Decimal | None:
    """What a text comes to; None where it has no number."""
    if pattern is not None:
        found = re.search(pattern, text)
    elif (found := FINAL.search(text)) is None:
        found = next(reversed(list(ANY.finditer(text))), None)
    if found is None or found[1] is None:
        return None
    try:
        return Decimal(found[1].replace(",", "").replace("$", "").strip())
    except InvalidOperation:
        return None
