"""Words to the user: nothing they gave us may steer their terminal, and every problem is said once, on its own line."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable

from adapt.errors import Problem

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Control and text-direction characters as visible escapes; line ends and tabs stay."""
    return CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", text)


def print_problems(problems: Iterable[Problem], console=None) -> None:
    """One line (wrapped and indented on a terminal) for each, on stderr."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = console or Console(stderr=True, highlight=False)
    for problem in problems:
        where, what = printable(problem.where), printable(problem.what)
        line = Text.assemble(("error: ", "bold red"), (f"{where}: " if where else "", "bold"), what)
        if console.is_terminal:
            first, *rest = line.wrap(console, max(20, console.width - 2))
            console.print(first)
            for more in rest:
                console.print(Padding(more, (0, 0, 0, 2)))
        else:
            console.print(line, soft_wrap=True)


class PrintableFormatter(logging.Formatter):
    """Log records quote names of files and datasets, which are the user's or somebody else's."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def say(text: str) -> None:
    """A line to stderr."""
    print(printable(text), file=sys.stderr, flush=True)
