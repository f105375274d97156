"""`adapt evaluate MODEL_OR_RUN [--suite bpb,masked_ce] [-c RECIPE]`: suites on held-out data, as a table or JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from adapt.errors import UserError

if TYPE_CHECKING:
    from adapt.components import SuiteChoice
    from adapt.config import Recipe
    from adapt.evaluate.context import EvalContext
    from adapt.generation.load import Opened

ROWS_PER_BATCH = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL_OR_RUN", help="run folder, model folder, Hub id, .gguf or pypi:<package>"
    )
    parser.add_argument("--suite", metavar="NAMES", help="bpb,masked_ce,... (default: the recipe's, else bpb)")
    parser.add_argument(
        "-c", "--config", metavar="RECIPE", help="recipe whose data.eval is used (default: the run's own)"
    )
    parser.add_argument("--limit", type=int, metavar="ROWS", help="rows per dataset (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=None, help="of the masks (default: the recipe's run.seed)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def evaluate(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: at least one row is needed to measure anything")
    from adapt.evaluate import runner
    from adapt.generation.load import open_model

    recipe = recipe_of(args)
    chosen = choices(args.suite, recipe)
    opened = open_model(args.model)
    start = start_of(args, recipe)
    results = runner.evaluate(chosen, context_of(opened, recipe, args.limit, args.seed, chosen, start))
    if args.json:
        print(json.dumps(results, indent=1))
    else:
        runner.print_results({k: v for k, v in (start or {}).items() if k in results}, results)
    return 0


def start_of(args: argparse.Namespace, recipe: Recipe) -> dict[str, float] | None:
    """What the run measured before its first step, where the same is measured now: its own data, as many rows of it."""
    from pathlib import Path

    from adapt.report.data import read

    if args.config is not None or (args.limit or recipe.evaluation.limit) != recipe.evaluation.limit:
        return None
    first = next((x for x in read(Path(args.model), "", "").evaluations if x["step"] == 0), None)
    return first and {k.removeprefix("eval/"): v for k, v in first.items() if k.startswith("eval/") and v is not None}


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe given, or the run's own (its last stage: what the run ended with)."""
    from pathlib import Path

    from adapt.config import load

    own = Path(args.model) / "config.yaml"
    if args.config is None and not own.is_file():
        raise UserError(
            f"{args.model} is no run folder, so say which data to measure on: -c RECIPE (its data.eval is used)"
        )
    recipe = load(args.config or str(own)).stages[-1]
    if not recipe.data.eval:
        raise UserError(f"{args.config or own} has no held-out data: add data.eval, or give another recipe with -c")
    return recipe


def choices(names: str | None, recipe: Recipe):
    """Suites by name, with the recipe's settings where it has them; without names, all of the recipe's."""
    from adapt.components import SuiteChoice
    from adapt.config import decode

    configured = recipe.evaluation.suites
    if names is None:
        return configured or (decode("bpb", SuiteChoice),)
    wanted = dict.fromkeys(n.strip() for n in names.split(",") if n.strip())
    found = ([c for c in configured if c.name == n] or [decode(n, SuiteChoice, "--suite")] for n in wanted)
    return tuple(choice for several in found for choice in several)


def context_of(
    opened: Opened,
    recipe: Recipe,
    limit: int | None,
    seed: int | None,
    chosen: tuple[SuiteChoice, ...] = (),
    start: dict[str, float] | None = None,
) -> EvalContext:
    """`chosen`: the suites to come, for those that need the recipe's teacher. `start`: see EvalContext."""
    from functools import partial

    from adapt.evaluate.context import EvalContext, guard_labels
    from adapt.generation.contract import Contract
    from adapt.models import attention
    from adapt.objectives.base import Facts
    from adapt.train.root import Root, look

    model = attention.use(opened.model)
    device = next(model.parameters()).device
    root = Root(model, teacher_of(recipe, chosen, opened.tokenizer, device)).eval()
    sets = held_out(recipe, opened.tokenizer, recipe.evaluation.limit if limit is None else limit)
    return EvalContext(
        call=partial(look, root),
        tokenizer=opened.tokenizer,
        eval_sets=sets,
        guards=guard_labels(recipe.data, list(sets)),
        start=start,
        facts=Facts(mask_token_id=getattr(model.config, "mask_token_id", None), attention=recipe.model.attention),
        contract=Contract.of(model.config),
        device=device,
        seed=recipe.run.seed if seed is None else seed,
    )


def teacher_of(recipe: Recipe, chosen: tuple[SuiteChoice, ...], tokenizer: Any, device: Any):
    """The recipe's teacher, where one of the suites compares with it."""
    from dataclasses import replace

    from adapt.distributed.world import World
    from adapt.train.teacher import build_teacher

    if not any(choice.declares("needs_teacher") for choice in chosen):
        return None
    if recipe.teacher is None:
        names = ", ".join(choice.name for choice in chosen if choice.declares("needs_teacher"))
        raise UserError(
            f"suite {names} compares with a teacher, and the recipe has none: add `teacher: {{base: self}}`"
        )
    wanted = replace(recipe, evaluation=replace(recipe.evaluation, suites=chosen))
    return build_teacher(wanted, tokenizer, World(0, 0, 1, 1, device))


def held_out(recipe: Recipe, tokenizer: Any, limit: int | None) -> dict[str, Callable[[], Iterator[Any]]]:
    from functools import partial

    from adapt.data.prepare import prepare
    from adapt.data.stream import eval_batches

    return {
        label: partial(eval_batches, shards, recipe.data.seq_len, ROWS_PER_BATCH, limit)
        for label, shards in prepare(recipe, tokenizer, train=False).eval.items()
    }
