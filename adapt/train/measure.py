"""An evaluation: the suites of a recipe on the model as it is."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from adapt.config.schema import Recipe
from adapt.objectives.base import Objective
from adapt.train.root import look
from adapt.train.signals import stop_point
from adapt.train.teacher import base_model

if TYPE_CHECKING:
    from adapt.train.fit import _Run


def measure(run: _Run, recipe: Recipe, objective: Objective) -> dict[str, float]:
    """What the suites found. Collective. Raises StopRequested, on all ranks, between two calls of the model."""
    from adapt.data.stream import eval_passes
    from adapt.evaluate.context import EvalContext, guard_labels
    from adapt.evaluate.runner import evaluate
    from adapt.generation.contract import Contract

    world, state = run.world, run.state
    data, shards = recipe.data, run.data.eval
    sets, pairs = eval_passes(shards, data.seq_len, recipe.evaluation.limit, world.rank, world.size)
    where = f"in the evaluation at step {state.step}; checkpoint saved"

    def reduce(values: dict[str, float]) -> dict[str, float]:
        return dict(zip(values, world.sum([float(v) for v in values.values()]), strict=True))

    def call(fn: Any, *args: Any) -> Any:
        stop_point(run.flag, world, where)
        return look(run.root, fn, *args)

    context = EvalContext(
        call=call,
        tokenizer=run.tokenizer,
        eval_sets=sets,
        pair_sets=pairs,
        reduce=reduce,
        keep=lambda grid: run.folder.add_grid(state.step, grid.to_dict()),
        facts=run.facts,
        contract=Contract.of(objective.export_fields()),
        guards=tuple(label for label in guard_labels(data, list(shards)) if label in sets),
        start=state.results.get("before") or ({} if state.step == 0 else None),
        base=partial(base_model, recipe, run.tokenizer, world, run.root.teacher),
        measured=state.measured,
        say=run.say,
        device=world.device,
        seed=recipe.run.seed,
    )
    return evaluate(recipe.evaluation.suites, context)
