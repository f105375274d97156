"""`adapt evaluate MODEL_OR_RUN [--suite bpb,masked_ce] [-c RECIPE]`: suites on held-out data, as a table or JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from adapt.errors import UserError

if TYPE_CHECKING:
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
    results = runner.evaluate(chosen, context_of(opened, recipe, args.limit, args.seed))
    if args.json:
        print(json.dumps(results, indent=1))
    else:
        runner.print_results({}, results)
    return 0


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


def context_of(opened: Opened, recipe: Recipe, limit: int | None, seed: int | None) -> EvalContext:
    from functools import partial

    from adapt.evaluate.context import EvalContext
    from adapt.generation.contract import Contract
    from adapt.models import attention
    from adapt.objectives.base import Facts
    from adapt.train.root import Root, look

    model = attention.use(opened.model)
    root = Root(model).eval()
    return EvalContext(
        call=partial(look, root),
        tokenizer=opened.tokenizer,
        eval_sets=held_out(recipe, opened.tokenizer, recipe.evaluation.limit if limit is None else limit),
        facts=Facts(mask_token_id=getattr(model.config, "mask_token_id", None), attention=recipe.model.attention),
        contract=Contract.of(model.config),
        device=next(model.parameters()).device,
        seed=recipe.run.seed if seed is None else seed,
    )


def held_out(recipe: Recipe, tokenizer: Any, limit: int | None) -> dict[str, Callable[[], Iterator[Any]]]:
    from functools import partial

    from adapt.data.prepare import prepare
    from adapt.data.stream import eval_batches

    return {
        label: partial(eval_batches, shards, recipe.data.seq_len, ROWS_PER_BATCH, limit)
        for label, shards in prepare(recipe, tokenizer, train=False).eval.items()
    }
