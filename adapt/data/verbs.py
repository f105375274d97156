"""`adapt data fetch | prepare | stats`: each takes the resolved recipe and the parsed arguments -> an exit code."""

from __future__ import annotations

import argparse
import json
from typing import Any

from adapt.config.load import Resolved
from adapt.config.schema import Recipe
from adapt.data.documents import BadRecord
from adapt.data.prepare import Prepared, open_sources, prepare
from adapt.data.stats import tables as stats_tables
from adapt.errors import Problem, UserError

FETCHED = {
    False: "Texts of files and of the Hub were not copied: preparation streams them, as far as max_tokens, and the token "
    "shards it writes are all that training needs; so run `adapt data prepare` where the network is.",
    True: "Packages now lie in the cache: `adapt data prepare` reads them there, without the network.",
}
"""What was said to have been fetched, by whether the source keeps what it downloads."""


def fetch(resolved: Resolved, args: argparse.Namespace) -> int:
    """Open every source and read its first document: a test of paths, names and access. Packages are brought into the
    cache whole; other texts are streamed when the data is prepared."""
    from rich.console import Console

    console = Console(highlight=False)
    problems: list[Problem] = []
    kept: set[bool] = set()
    for recipe in _different(resolved):
        held_out, training = open_sources(recipe.data)
        for where, dataset, source in [*training, *held_out]:
            kept.add(hasattr(source, "fetch"))
            try:
                if hasattr(source, "fetch"):
                    source.fetch()
                fingerprint = source.fingerprint()
                made_here = hasattr(source, "use_tokenizer")  # for a tokenizer: there is nothing to fetch
                first = (
                    fingerprint
                    if made_here
                    else next((d for d in source.documents() if not isinstance(d, BadRecord)), None)
                )
                if first is None:
                    raise UserError(f"{source.where}: there is no readable document in it")
            except UserError as error:
                problems += [Problem(p.where or where, p.what) for p in error.problems]
                continue
            label = dataset.name or source.label
            console.print(
                f"{label}: {source.where}, {source.licence or 'licence not stated'}, {fingerprint[:16]}", markup=False
            )
    if problems:
        raise UserError(problems)
    console.print(
        "Every source answers and its first document can be read.", *map(FETCHED.get, sorted(kept)), soft_wrap=True
    )
    return 0


def prepare_verb(resolved: Resolved, args: argparse.Namespace) -> int:
    """Build the token shards (or find them finished) and say where they lie."""
    for _, prepared in _prepared(resolved):
        for label, shards in _labelled(prepared):
            print(f"{label}: {shards.num_tokens:,d} tokens, {shards.num_documents:,d} documents: {shards.folder}")
    return 0


def stats(resolved: Resolved, args: argparse.Namespace) -> int:
    """Print the manifest, once every file is found to be as it was written; with `args.json`, as JSON."""
    from rich.console import Console

    manifests = [(prepared.manifest, prepared) for _, prepared in _prepared(resolved)]
    for _, prepared in manifests:
        for _, shards in _labelled(prepared):
            shards.verify()
    if getattr(args, "json", False):
        print(json.dumps([manifest for manifest, _ in manifests], indent=1, ensure_ascii=False))
        return 0
    console = Console()
    for manifest, prepared in manifests:
        labelled = [(label, {**s.manifest, "fingerprint": s.fingerprint}) for label, s in _labelled(prepared)]
        for table in stats_tables(labelled, console.width):
            console.print(table)
        console.print(f"fingerprint {manifest['fingerprint']}", markup=False)
    return 0


def _labelled(prepared: Prepared) -> list[tuple[str, Any]]:
    return [(f"train/{s.label}", s) for s in prepared.train] + [(f"eval/{k}", s) for k, s in prepared.eval.items()]


def _prepared(resolved: Resolved) -> list[tuple[Recipe, Prepared]]:
    from adapt.conversion.base import planned_tokenizer

    recipes = _different(resolved)
    tokenizer = planned_tokenizer(recipes[0])
    return [(recipe, prepare(recipe, tokenizer)) for recipe in recipes]


def _different(resolved: Resolved) -> list[Recipe]:
    """One recipe per different `data` section: stages mostly share theirs."""
    recipes: list[Recipe] = []
    for recipe in resolved.stages:
        if all(recipe.data != other.data for other in recipes):
            recipes.append(recipe)
    return recipes
