"""Made-up word problems with worked answers in GSM8K's form; every one is a function of the seed and its number.

As preference pairs, the rejected answer is the right one with a calculation gone wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from adapt.components import sources
from adapt.data.documents import Document
from adapt.data.noise import generator

SALT = 0x61_7269_7468


@dataclass(frozen=True, kw_only=True)
class ArithmeticConfig:
    split: Literal["train", "held-out"] = "train"
    """Problems to train on, or the others. With the same `held_out` and `held_out_templates` they share none."""
    count: int = 5000
    """Problems."""
    seed: int = 0
    """Seeds what is drawn, not what is held out."""
    held_out: float = 0.1
    """Fraction of the possible numbers of every template that is held out, by a hash of template and numbers."""
    pairs: bool = False
    """Preference pairs: the worked answer (chosen), and the same with one calculation wrong and what follows from that."""
    held_out_templates: int = 0
    """Hold out this many whole templates (the last ones) instead: the held-out problems are of kinds never seen."""

    def __post_init__(self) -> None:
        from adapt.data.word_problems import TEMPLATES

        if self.count < 1:
            raise ValueError(f"count={self.count} must be 1 or more")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} is a fraction of the problems: between 0 and 1")
        if not 0 <= self.held_out_templates < len(TEMPLATES):
            raise ValueError(
                f"held_out_templates={self.held_out_templates} must be from 0 to {len(TEMPLATES) - 1}; there are "
                f"{len(TEMPLATES)} templates"
            )


class ArithmeticSource:
    licence = "Apache-2.0"

    def __init__(self, config: ArithmeticConfig):
        self.config = config
        self.label = "arithmetic" if config.split == "train" else "arithmetic-held-out"
        self.where = "made-up word problems"

    def fingerprint(self) -> str:
        from adapt.data.word_problems import VERSION

        return hashlib.sha256(repr((VERSION, self.config)).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        from adapt.data.word_problems import TEMPLATES, is_held_out, problem, slipped

        config, held_out = self.config, self.config.split == "held-out"
        seen = len(TEMPLATES) - config.held_out_templates
        whole = config.held_out_templates > 0
        templates = range(seen, len(TEMPLATES)) if whole and held_out else range(seen)
        for number in range(config.count):
            rng = generator(config.seed, SALT, held_out, number)
            found = problem(rng, templates)
            while not whole and is_held_out(found, config.held_out) != held_out:
                found = problem(rng, templates)
            facts = {"part": f"template {found.template}", "answer": found.answer}
            if config.pairs:
                answers = {"chosen": found.solution, "rejected": slipped(rng, found)}
            else:
                answers = {"response": found.solution}
            identity = f"arithmetic:{config.split}:{number}"
            yield Document(id=identity, prompt=f"{found.question}\n", **answers, meta=facts)


@sources.register("arithmetic")
def arithmetic(config: ArithmeticConfig) -> ArithmeticSource:
    return ArithmeticSource(config)
