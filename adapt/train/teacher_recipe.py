"""Which model a recipe's teacher is. Nothing is loaded."""

from __future__ import annotations

import dataclasses

from adapt.config.schema import Model, Recipe, Tokenizer


def as_taught(recipe: Recipe) -> Recipe:
    """The recipe whose model is the teacher: the base before conversions, or another model altogether."""
    teacher, own = recipe.teacher, recipe.model
    if teacher.base == "self":
        model = dataclasses.replace(own, conversions=(), dtype=teacher.dtype, revision=teacher.revision or own.revision)
    else:
        model = Model(
            base=teacher.base,
            arch=teacher.arch,
            revision=teacher.revision,
            dtype=teacher.dtype,
            attention=own.attention,
            trust_remote_code=own.trust_remote_code,
        )
    return dataclasses.replace(recipe, model=model, tokenizer=Tokenizer())
