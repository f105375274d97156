"""What the user did wrong, said once and completely. The CLI turns these into exit codes (design: 2 and 75)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the user's input: where (dotted config key or file), what, and what to do instead."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


class UserError(Exception):
    """The user's input is wrong (exit code 2). Carries every problem found, not just the first."""

    exit_code = 2

    def __init__(self, problems: str | Problem | Iterable[Problem]):
        if isinstance(problems, str):
            problems = [Problem("", problems)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems = list(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class RecipeError(UserError):
    """A recipe that cannot be read as it stands. What of it can be read goes along, for the checks that come next."""

    def __init__(self, problems: str | Problem | Iterable[Problem], readable: Any = None):
        """`readable`: the Resolved recipe without the keys the problems name; null where too little is left."""
        super().__init__(problems)
        self.readable = readable


class NotReachable(UserError):
    """It may well exist, but not from here, now: no connection, or offline was asked for."""


class StopRequested(Exception):
    """Ctrl-C, TERM or USR1: a checkpoint was saved and the run wants to go on later (exit code 75)."""

    exit_code = 75


class RunLost(Exception):
    """A run cannot go on here, through no fault of its recipe; what was saved is intact."""

    exit_code = 1


class Superseded(RunLost):
    """A newer attempt has taken up the run (exit code 1: nobody waits for this one)."""


class RankLost(RunLost):
    """A rank died or hangs; the message names it. Exit code 71: started again, the run may well succeed."""

    exit_code = 71


def nearest(word: str, choices: Iterable[str]) -> str:
    """A ' Did you mean ...?' suffix, or '' when nothing is close."""
    import difflib

    hits = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {hits[0]!r}?" if hits else ""
