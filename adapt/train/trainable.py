"""Which parameters train: name patterns, and adapters whenever there are any."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection

from adapt.config.schema import Trainable
from adapt.errors import Problem, UserError


def select(names: list[str], trainable: Trainable, created: Collection[str] = ()) -> set[str]:
    """The names that train; `created` are those that conversions made, which train beside adapters, too. Raises UserError for a pattern that matches nothing (a silent no-op is a week lost), and
    where nothing is left."""
    problems = [
        Problem(f"trainable.{key}", f"pattern {pattern!r} matches no parameter; names look like {names[0]!r}")
        for key in ("include", "exclude")
        for pattern in getattr(trainable, key)
        if not fnmatch.filter(names, pattern)
    ]
    if problems:
        raise UserError(problems)

    def matches(name: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatch(name, p) for p in patterns)

    chosen = {n for n in names if matches(n, trainable.include) and not matches(n, trainable.exclude)}
    if trainable.lora is not None:
        chosen = {n for n in chosen if "lora_" in n or n in created}
        hint = (
            "; with lora only the adapters and what conversions created train; include and exclude choose among those"
        )
    else:
        hint = ""
    if not chosen:
        raise UserError(Problem("trainable", f"nothing is left to train; widen include or narrow exclude{hint}"))
    return chosen
