"""The tokenizer of a run that names a tokenizer recipe: built where it is not there yet, and found again after that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapt.errors import NotReachable, Problem, UserError

WHERE = "tokenizer.recipe"
DECIDING = ("base", "revision", "tokens", "method", "train")
"""Keys of a tokenizer recipe that decide which tokens there are."""


def built_tokenizer(name: str, *, offline: bool = False) -> Path:
    """The folder of the tokenizer recipe `name` (a file or a shipped one), built now unless it is there. Raises
    NotReachable where it is not and `offline`, UserError where the folder holds what another recipe made."""
    from filelock import FileLock

    from adapt.config.decode import encode
    from adapt.tokenization.recipe import load

    try:
        recipe = load(name, [])
    except UserError as error:
        raise UserError([_own(p) for p in error.problems]) from None
    if not recipe.out.exists():
        if offline:
            what = f"{recipe.out} is not built yet: `adapt tokenizer extend -c {name}`, or `adapt fit` builds it"
            raise NotReachable(Problem(WHERE, what))
        recipe.out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(recipe.out.with_name(f".{recipe.out.name}.lock")):
            if not recipe.out.exists():
                _build(recipe)
    if wrong := _others(recipe.out, encode(recipe)):
        raise UserError(
            Problem(
                WHERE,
                f"{recipe.out} was made with another {' and '.join(wrong)} than {name} has now, so it is another "
                f"tokenizer. `adapt tokenizer extend -c {name}` builds it again; to keep it, name its folder in "
                "tokenizer.path",
            )
        )
    return recipe.out


def _build(recipe: Any) -> None:
    from adapt.console import say
    from adapt.tokenization.extend import extend
    from adapt.tokenization.verb import show_extended

    try:
        show_extended(extend(recipe, say))
    except UserError as error:
        raise UserError([_own(p) for p in error.problems]) from None


def _others(folder: Path, wanted: dict[str, Any]) -> list[str]:
    """Keys of the recipe in which the folder's differs."""
    from adapt.tokenization.folder import MARKER

    try:
        made = json.loads((folder / MARKER).read_text("utf-8"))["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        what = f"{folder} exists and was not made by `adapt tokenizer extend`; give the recipe another name or dir"
        raise UserError(Problem(WHERE, what)) from None
    return [key for key in DECIDING if made.get(key) != wanted[key]]


def _own(problem: Problem) -> Problem:
    return Problem(f"{WHERE}: {problem.where}" if problem.where else WHERE, problem.what)
