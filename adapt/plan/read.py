"""From a recipe to stage plans: shapes of student and teacher, without a weight and without the Hub where need be."""

from __future__ import annotations

from typing import Any

from adapt.config import Resolved, shipped_recipes
from adapt.config.schema import Recipe
from adapt.config.text import read_yaml
from adapt.errors import NotReachable, Problem, UserError
from adapt.plan.cluster import Cluster
from adapt.plan.model import PlannedModel
from adapt.plan.stage import StagePlan, grid_of
from adapt.pretrained.arch import NEEDED
from adapt.pretrained.families import FAMILIES
from adapt.train.rules import learners
from adapt.train.teacher_recipe import as_taught


def stage_plans(resolved: Resolved, cluster: Cluster) -> tuple[list[StagePlan], list[str]]:
    """The plan of every stage (of every arm), and what stays open. Raises UserError with every problem."""
    found: list[StagePlan] = []
    notes: list[str] = []
    for run in (resolved.arms or {"": resolved}).values():
        for recipe in run.stages:
            grid_of(recipe.trainer.mesh, cluster.gpus)  # before anything is read or printed
    for arm, run in (resolved.arms or {"": resolved}).items():
        config = student_config(run.recipe, notes)
        teachers: dict[str, Any] = {}
        for name, recipe in zip(run.names, run.stages, strict=True):
            asked = f"{recipe.teacher} of {learners(recipe)}"
            if asked not in teachers:
                teachers[asked] = teacher_config(recipe, notes)
            label = " / ".join(part for part in (arm, name if len(run.stages) > 1 else "") if part)
            found.append(stage_plan(label, recipe, cluster, config, teachers[asked]))
    return found, list(dict.fromkeys(notes))


def stage_plan(name: str, recipe: Recipe, cluster: Cluster, config: Any, teacher: Any) -> StagePlan:
    student, taught = PlannedModel.student(recipe, config), None
    if teacher is not None:
        layers = None if recipe.objective.declares("needs_teacher") else 0
        if layers is None and student.inside:  # what lies above the last of them is not asked
            layers = max(student.backward) + 1
        taught = PlannedModel.frozen(teacher, recipe.teacher.dtype, layers=layers)
    return StagePlan(name, recipe, cluster, student, taught)


def student_config(recipe: Recipe, notes: list[str]) -> Any:
    from adapt.pretrained.check import inspect_base

    found = inspect_base(recipe)
    if found.problems:
        asked = [stated_shapes(recipe.model.base)] if found.config is None and not _local(recipe.model.base) else []
        raise UserError([*found.problems, *asked])
    notes += found.unchecked
    if found.tokenizer is None and any(choice.declares("fills_rows") for choice in recipe.model.conversions):
        notes.append(
            f"rows that conversions add for new tokens are not counted: {found.config.vocab_size:,} are the base's"
        )
    return found.config


def stated_shapes(base: str) -> Problem:
    """What to type where a base's shape is asked for: the shape itself, where a shipped recipe states it."""
    for name, path in shipped_recipes().items():
        model = read_yaml(path.read_text()).get("model", {})
        arch = model.get("arch") or {}
        if _plain(str(model.get("base"))) == _plain(base) and all(key in arch for key in NEEDED):
            text = ", ".join(f"{k}: {str(v).lower()}" for k, v in arch.items() if not isinstance(v, dict | list))
            return Problem("model.arch", f"{name} states that of {model['base']}: 'model.arch={{{text}}}'")
    keys = ", ".join(f"{key}: N" for key in NEEDED)
    return Problem(
        "model.arch", f"as its config.json has it: 'model.arch={{model_type: {'|'.join(FAMILIES)}, {keys}}}'"
    )


def _plain(base: str) -> str:
    """A base and what was made of it by more training have one shape."""
    return base.lower().removesuffix("-instruct").removesuffix("-base")


def _local(base: str) -> bool:
    return base.startswith((".", "/", "~")) or base.endswith(".gguf")


def teacher_config(recipe: Recipe, notes: list[str]) -> Any:
    """None where no teacher is in memory, or its shape is out of reach."""
    from adapt.pretrained import load_config

    if recipe.teacher is None or not learners(recipe):
        return None
    try:
        return load_config(as_taught(recipe).model)
    except NotReachable:
        notes.append(
            f"teacher.base: {recipe.teacher.base} is out of reach; state its shape in teacher.arch to have it counted"
        )
        return None
