"""What each part of a converted model is worth: the same measurements with the part taken out.

    ablation/whole/...          the model as it is
    ablation/recurrent/...      recurrent layers write nothing into the residual stream
    ablation/attention/...      nor do the layers that kept their attention (left out where none did)
    ablation/convolutions/...   short convolutions pass tokens through
    ablation/decays/...         nothing is forgotten: all decays are 1
    .../bpb/<dataset>           bits per byte of held-out text
    .../passkey_nll             nats per token of passkeys

Hybrids may leave their recurrent layers unused (arXiv 2510.05901), and likelihood alone hides it:
where `recurrent` costs next to nothing, the attention that was kept does all the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

from adapt.components import suites
from adapt.errors import Problem
from adapt.evaluate.context import EvalContext
from adapt.evaluate.suites.passkey import check_grid, length_problems, passkeys

Part = Literal["recurrent", "attention", "convolutions", "decays"]


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    parts: tuple[Part, ...] = ("recurrent", "attention", "convolutions", "decays")
    """What is taken out, one at a time."""
    lengths: tuple[int, ...] = (256,)
    """Tokens of the passkey texts."""
    depths: int = 5
    """Equal parts of these texts; a key stands anywhere in its part."""
    trials: int = 2
    """Texts of each length and depth."""
    prompt: Literal["trained", "plain"] = "trained"
    """As the suite passkey has it."""
    at_start: bool = False
    """Before the first step, too: what an untrained conversion's parts are worth."""

    def __post_init__(self) -> None:
        check_grid(self)
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError(f"parts={list(self.parts)} must be one or more different parts")

    def problems(self, recipe) -> Iterator[Problem]:
        from adapt.evaluate.ablated import recurrent_problems

        yield from length_problems("ablation", self.lengths, recipe)
        yield from recurrent_problems("ablation", recipe)

    def metrics(self, recipe, datasets: list[str]) -> list[str]:
        """What every evaluation has: `attention` may have no layers, and the start may be left out."""
        parts = ["whole", *(p for p in self.parts if p != "attention")] if self.at_start else []
        return [
            f"ablation/{part}/{what}" for part in parts for what in (*(f"bpb/{d}" for d in datasets), "passkey_nll")
        ]


class Ablation:
    brings_data = True

    def __init__(self, config: AblationConfig):
        self.config = config

    def __call__(self, context: EvalContext) -> dict[str, float]:
        from adapt.evaluate.ablated import PARTS, recurrent, without

        student = context.call(lambda models: models.student)
        recurrent(student)  # said at the start, not when all the training is done
        if context.start == {} and not self.config.at_start:
            return {}
        questions, _ = passkeys(self.config, context)
        results = {}
        for part in ("whole", *self.config.parts):
            if part != "whole" and not PARTS[part](student):
                continue
            with nullcontext() if part == "whole" else without(student, part):
                results |= {f"ablation/{part}/{what}": value for what, value in measured(context, questions).items()}
        return results


@suites.register("ablation")
def ablation(config: AblationConfig) -> Ablation:
    return Ablation(config)


def measured(context: EvalContext, questions) -> dict[str, float]:
    from adapt.evaluate.answers import answer_nats, mean
    from adapt.evaluate.suites.bpb import nats_and_bytes, per_byte

    found = {f"bpb/{label}": per_byte(nats_and_bytes(context, label)) for label in context.datasets}
    nats = zip(answer_nats(context, questions), questions, strict=True)
    return found | {"passkey_nll": mean(n / len(q.answer) for n, q in nats)}
