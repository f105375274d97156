"""The frozen model a run learns from or compares itself with: loaded, checked, sharded as a root of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from adapt.config.schema import Recipe, Teacher
from adapt.distributed.world import World
from adapt.errors import Problem, UserError
from adapt.models import attention
from adapt.pretrained import load_model, load_tokenizer
from adapt.pretrained.outline import load_outline
from adapt.train.build import place
from adapt.train.root import Frozen, look_at
from adapt.train.rules import learners
from adapt.train.teacher_recipe import as_taught


def build_teacher(recipe: Recipe, tokenizer: Any, world: World) -> Frozen | None:
    """The teacher of a stage on the device, or None where nothing needs one. `tokenizer` is the student's; raises
    UserError where the two do not read the same tokens."""
    if recipe.teacher is None or not learners(recipe):
        return None
    return _frozen(recipe, tokenizer, world)


@contextmanager
def base_model(
    recipe: Recipe, tokenizer: Any, world: World, teacher: Frozen | None = None
) -> Iterator[Callable[..., Any]]:
    """The base before conversions for as long as this lasts, as the `call` of an EvalContext whose student it is. The
    stage's `teacher` is used where it is that model. Raises UserError where it reads other tokens than the student."""
    own = recipe.teacher
    at_hand = own is not None and own.base == "self" and own.revision in (None, recipe.model.revision)
    if teacher is None or not at_hand:
        teacher = _frozen(dataclasses.replace(recipe, teacher=Teacher(dtype=recipe.model.dtype)), tokenizer, world)
    was, teacher.model.config.use_cache = teacher.model.config.use_cache, True
    try:
        yield lambda fn, *args: look_at(teacher, fn, *args)
    finally:
        teacher.model.config.use_cache = was


def _frozen(recipe: Recipe, tokenizer: Any, world: World) -> Frozen:
    theirs = as_taught(recipe)
    check_tokens(tokenizer, load_tokenizer(theirs))
    outline = load_outline(theirs) if world.grouped else None
    model = attention.use(outline[0] if outline else load_model(theirs))
    model.config.use_cache = False
    frozen = Frozen(model)
    place(frozen, model, outline[1] if outline else None, recipe, world)
    return frozen


def check_tokens(student: Any, teacher: Any) -> None:
    """The teacher reads the student's rows as they are, so every token must have the same number in both. Special
    tokens that a conversion added never stand in text."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    special = {t.content for t in student.added_tokens_decoder.values() if t.special}
    moved = [t for t in ours if ours[t] != theirs.get(t) and not (t in special and t not in theirs)]
    if moved:
        token = min(moved, key=ours.__getitem__)
        there = f"number {theirs[token]}" if token in theirs else "missing"
        raise UserError(
            Problem(
                "teacher.base",
                f"the teacher has other tokens: {token!r} is number {ours[token]} here and {there} there ({len(moved):,} "
                "differ). Distributions over tokens can be compared within one tokenizer only; take a teacher that "
                "shares it, or do without one (bpb and forgetting compare across tokenizers)",
            )
        )
