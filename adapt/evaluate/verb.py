"""`adapt evaluate MODEL_OR_RUN [--suite bpb,masked_ce] [-c RECIPE] [--lm-eval TASKS]`: suites, and tasks of the
lm-evaluation-harness, as a table or JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from adapt.errors import UserError

if TYPE_CHECKING:
    from adapt.components import SuiteChoice
    from adapt.config import Recipe
    from adapt.evaluate.context import EvalContext
    from adapt.evaluate.grid import Grid
    from adapt.generation.load import Opened


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL_OR_RUN", help="run folder, model folder, Hub id, .gguf or pypi:<package>"
    )
    parser.add_argument("--suite", metavar="NAMES", help="bpb,masked_ce,... (default: the recipe's, else bpb)")
    parser.add_argument(
        "-c", "--config", metavar="RECIPE", help="recipe whose data.eval is used (default: the run's own)"
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="ROWS",
        help="rows per dataset (default: the recipe's); documents per --lm-eval task",
    )
    parser.add_argument(
        "--seed", type=int, default=None, help="of masks and of generated tasks (default: the recipe's run.seed)"
    )
    parser.add_argument(
        "--lm-eval",
        metavar="TASKS",
        help="tasks of the lm-evaluation-harness: arc_easy,mmlu_*,... (suites then run only if --suite asks for them)",
    )
    parser.add_argument("--lm-eval-include", metavar="DIR", help="folder with YAML files of your own harness tasks")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def evaluate(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: at least one row is needed to measure anything")
    from adapt.evaluate import runner
    from adapt.generation.load import open_model

    recipe = recipe_of(args)
    chosen = choices(args.suite, recipe) if args.suite or not args.lm_eval else ()
    check_data(chosen, args, recipe)
    harness_tasks = lm_eval_tasks(args)
    opened = open_model(args.model)
    start = start_of(args, recipe)
    grids: list[Grid] = []
    results: dict[str, float] = {}
    if chosen:
        seed = seed_of(args, recipe)
        context = context_of(opened, recipe, args.limit, seed, chosen=chosen, start=start, keep=grids.append)
        results = runner.evaluate(chosen, context)
    if harness_tasks:
        from adapt.evaluate import harness

        results |= harness.measure(opened.model, opened.tokenizer, *harness_tasks, args.limit, seed_of(args, recipe))
    if args.json:
        cells = {"grids": [grid.to_dict() for grid in grids]} if grids else {}
        print(json.dumps(results | cells, indent=1))
    else:
        runner.print_results({k: v for k, v in (start or {}).items() if k in results}, results)
        runner.print_grids(grids)
    return 0


def start_of(args: argparse.Namespace, recipe: Recipe | None) -> dict[str, float] | None:
    """What the run measured before its first step, where the same is measured now: its own data, as many rows of it."""
    from pathlib import Path

    from adapt.report.data import read

    if recipe is None or args.config is not None or (args.limit or recipe.evaluation.limit) != recipe.evaluation.limit:
        return None
    first = next((x for x in read(Path(args.model), "", "").evaluations if x["step"] == 0), None)
    return first and {k.removeprefix("eval/"): v for k, v in first.items() if k.startswith("eval/") and v is not None}


def recipe_of(args: argparse.Namespace) -> Recipe | None:
    """The recipe given, or the run's own (its last stage: what the run ended with); None of a plain model."""
    from pathlib import Path

    from adapt.config import load

    own = Path(args.model) / "config.yaml"
    if args.config is None and not own.is_file():
        return None
    return load(args.config or str(own)).stages[-1]


def check_data(chosen: Iterable[SuiteChoice], args: argparse.Namespace, recipe: Recipe | None) -> None:
    """Raises UserError where a suite needs held-out data and there is none."""
    needing = ", ".join(dict.fromkeys(c.name for c in chosen if not c.declares("brings_data")))
    if needing and recipe is None:
        raise UserError(
            f"{args.model} is no run folder, so say which data to measure {needing} on: -c RECIPE (its data.eval is "
            f"used)"
        )
    if needing and not recipe.data.eval:
        named = args.config or f"the recipe of {args.model}"
        raise UserError(f"{needing}: {named} has no held-out data: add data.eval, or give another recipe with -c")


def choices(names: str | None, recipe: Recipe | None):
    """Suites by name, with the recipe's settings where it has them; without names, all of the recipe's."""
    from adapt.components import SuiteChoice
    from adapt.config import decode

    configured = recipe.evaluation.suites if recipe else ()
    if names is None:
        return configured or (decode("bpb", SuiteChoice),)
    wanted = dict.fromkeys(n.strip() for n in names.split(",") if n.strip())
    found = ([c for c in configured if c.name == n] or [decode(n, SuiteChoice, "--suite")] for n in wanted)
    return tuple(choice for several in found for choice in several)


def lm_eval_tasks(args: argparse.Namespace) -> tuple[Any, list[str]] | None:
    if args.lm_eval is None:
        if args.lm_eval_include is not None:
            raise UserError("--lm-eval-include holds tasks for --lm-eval; say which: --lm-eval TASKS")
        return None
    from adapt.evaluate import harness

    return harness.task_manager(args.lm_eval.split(","), args.lm_eval_include)


def seed_of(args: argparse.Namespace, recipe: Recipe | None) -> int:
    return args.seed if args.seed is not None else recipe.run.seed if recipe else 0


def context_of(
    opened: Opened,
    recipe: Recipe | None,
    limit: int | None,
    seed: int,
    *,
    chosen: tuple[SuiteChoice, ...] = (),
    start: dict[str, float] | None = None,
    keep: Callable[[Grid], None] = lambda grid: None,
) -> EvalContext:
    """`chosen`: the suites to come, for those that need the recipe's teacher. `start`, `keep`: see EvalContext."""
    from functools import partial

    from adapt.data.prepare import prepare
    from adapt.data.stream import eval_passes
    from adapt.evaluate.context import EvalContext, guard_labels
    from adapt.generation.contract import Contract
    from adapt.models import attention
    from adapt.objectives.base import Facts
    from adapt.train.root import Root, look

    model = attention.use(opened.model)
    device = next(model.parameters()).device
    root = Root(model, teacher_of(recipe, chosen, opened.tokenizer, device)).eval()
    shards = prepare(recipe, opened.tokenizer, train=False).eval if recipe and recipe.data.eval else {}
    sets, pairs = eval_passes(shards, recipe.data.seq_len, limit or recipe.evaluation.limit) if shards else ({}, {})
    return EvalContext(
        call=partial(look, root),
        tokenizer=opened.tokenizer,
        eval_sets=sets,
        pair_sets=pairs,
        guards=tuple(label for label in guard_labels(recipe.data, list(shards)) if label in sets) if shards else (),
        start=start,
        keep=keep,
        facts=Facts(
            mask_token_id=getattr(model.config, "mask_token_id", None),
            attention=recipe.model.attention if recipe else "auto",
        ),
        contract=Contract.of(model.config),
        base=base_of(recipe, opened, device) if recipe and recipe.model.conversions else None,
        device=device,
        seed=seed,
    )


def base_of(recipe: Recipe, opened: Opened, device: Any):
    """The recipe's model before its conversions, to be opened; in the dtype of the one that is measured."""
    from dataclasses import replace
    from functools import partial

    from adapt.distributed.world import World
    from adapt.train.teacher import base_model

    dtype = "bfloat16" if device.type == "cuda" else "float32"
    alike = replace(recipe, model=replace(recipe.model, dtype=dtype))
    return partial(base_model, alike, opened.tokenizer, World(0, 0, 1, 1, device))


def teacher_of(recipe: Recipe | None, chosen: tuple[SuiteChoice, ...], tokenizer: Any, device: Any):
    """The recipe's teacher, where one of the suites compares with it."""
    from dataclasses import replace

    from adapt.distributed.world import World
    from adapt.train.teacher import build_teacher

    if not any(choice.declares("needs_teacher") for choice in chosen):
        return None
    if recipe is None or recipe.teacher is None:
        names = ", ".join(choice.name for choice in chosen if choice.declares("needs_teacher"))
        raise UserError(
            f"suite {names} compares with a teacher, and the recipe has none: add `teacher: {{base: self}}`"
        )
    wanted = replace(recipe, evaluation=replace(recipe.evaluation, suites=chosen))
    return build_teacher(wanted, tokenizer, World(0, 0, 1, 1, device))
