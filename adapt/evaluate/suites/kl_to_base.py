"""How far the next-token distribution moved from the teacher's, on the held-out sets marked `guard`.

    kl_to_base/<dataset>   nats per scored token, KL(teacher || student)

With `teacher: {base: self}` that is KL(p_0 || p_t): 0 at step 0, and a finer measure of forgetting than the likelihood,
which may stay where it is while the distribution moves. It compares tokens, so both must share a tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from adapt.components import suites
from adapt.errors import Problem, UserError
from adapt.evaluate.context import EvalContext, Suite, guard_labels


@dataclass(frozen=True, kw_only=True)
class KlToBaseConfig:
    needs_teacher: ClassVar[bool] = True

    def problems(self, recipe) -> Iterator[Problem]:
        if recipe.data.eval and not any(dataset.guard for dataset in recipe.data.eval):
            yield Problem("", "kl_to_base measures on guards, and no entry of data.eval is marked `guard: true`")

    def metrics(self, recipe, datasets: list[str]) -> list[str]:
        return [f"kl_to_base/{label}" for label in guard_labels(recipe.data, datasets)]


@suites.register("kl_to_base")
def kl_to_base(config: KlToBaseConfig) -> Suite:
    return measure


def measure(context: EvalContext) -> dict[str, float]:
    from adapt.evaluate.tokens import scored, token_mean
    from adapt.losses.linear_kl import token_kl
    from adapt.objectives.base import Models

    if not context.guards:
        raise UserError("suite kl_to_base measures on guards: mark an entry of data.eval with `guard: true`")

    def divergence(models: Models, inputs: dict) -> float:
        if models.teacher is None:
            raise UserError("suite kl_to_base needs a teacher: add `teacher: {base: self}` to the recipe")
        student, teacher = (scored(m, inputs, context.facts.attention) for m in (models.student, models.teacher))
        if not len(inputs["source"]):  # the models were called: in step with the other ranks
            return 0.0
        return float(token_kl(*student, *teacher).double().sum())

    return {f"kl_to_base/{label}": token_mean(context, label, divergence) for label in context.guards}
