"""Stop strings: a text ends before the first of them, wherever blocks and tokens have their boundaries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adapt.errors import UserError

UNFINISHED = "\ufffd"
"""What a tokenizer decodes an incomplete character to."""


@dataclass(frozen=True)
class Stop:
    strings: tuple[str, ...]
    decode: Callable[[list[int]], str]
    """Token ids -> text. A token may stand for part of a character, or for many; only text can be searched."""

    @staticmethod
    def of(strings: Sequence[str], decode: Callable[[list[int]], str] | None) -> Stop | None:
        if isinstance(strings, str):
            raise ValueError(f"stop={strings!r} is one string; give a list of them, [{strings!r}]")
        if not strings:
            return None
        if "" in strings:
            raise UserError("a stop string is empty, and every text begins with it: give some text, or leave it out")
        if decode is None:
            raise ValueError("stop strings are found in text: give `decode` as well, token ids -> text")
        return Stop(tuple(strings), decode)

    def found(self, text: str) -> int | None:
        """Where the earliest stop string begins."""
        return min((at for s in self.strings if (at := text.find(s)) >= 0), default=None)

    def sure(self, text: str) -> int:
        """Characters at the front of a text that no continuation can turn into a part of a stop string."""
        text = text.rstrip(UNFINISHED)
        near = max(0, len(text) - max(map(len, self.strings)) + 1)  # what lies before is too far back to matter
        starts = (i for i in range(near, len(text)) if any(s.startswith(text[i:]) for s in self.strings))
        return next(starts, len(text))

    def whole(self, tokens: list[int], text: str, end: int) -> int:
        """How many of the tokens lie wholly before character `end` of their text."""
        for count in range(len(tokens), 0, -1):
            front = self.decode(tokens[:count])
            if len(front) <= end and text.startswith(front):
                return count
        return 0
