"""The frozen model a run learns from or compares itself with: loaded, checked, sharded as a root of its own."""

from __future__ import annotations

from typing import Any

from adapt.config.schema import Recipe
from adapt.distributed.shard import make_mesh, shard
from adapt.distributed.world import World
from adapt.errors import Problem, UserError
from adapt.models import attention
from adapt.pretrained import load_model, load_tokenizer
from adapt.train.build import compute_dtype
from adapt.train.root import Frozen
from adapt.train.rules import learners
from adapt.train.teacher_recipe import as_taught


def build_teacher(recipe: Recipe, tokenizer: Any, world: World) -> Frozen | None:
    """The teacher of a stage on the device, or None where nothing needs one. `tokenizer` is the student's; raises
    UserError where the two do not read the same tokens."""
    if recipe.teacher is None or not learners(recipe):
        return None
    theirs = as_taught(recipe)
    check_tokens(tokenizer, load_tokenizer(theirs))
    model = attention.use(load_model(theirs))
    model.config.use_cache = False
    frozen = Frozen(model)
    if not world.grouped:
        return frozen.to(world.device)
    shard(frozen, [model], make_mesh(world, recipe.trainer.mesh), compute_dtype(recipe, world))
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
