"""Which pieces of text are written in given Unicode scripts (UAX #24), parts of a character included."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from functools import cached_property

SHARED = ("Common", "Inherited")
"""Spaces, digits, most punctuation and symbols; combining marks. They belong to no script of their own."""


class Scripts:
    """`Script_Extensions` decides: a mark that is used with a few scripts only (`。`, `ー`) belongs to those, and what
    is used with all belongs to every one.

    A byte-level piece may begin or end inside a character. Such a part passes if a character that passes has it: `E0 A4`
    begins Devanagari letters and nothing else, `E6` only Chinese ones. Without these, no character of three bytes whose
    first two make no token yet could ever become one."""

    def __init__(self, names: Iterable[str]):
        """Raises ValueError for a name that is no script's."""
        import regex

        self.names = tuple(names)
        for name in self.names:
            try:
                known = re.fullmatch("[A-Za-z_ ]+", name) and regex.compile(_property(name))
            except regex.error:
                known = None
            if not known:
                raise ValueError(
                    f"scripts: {name!r} is no Unicode script; they are called Latin, Greek, Cyrillic, Arabic, Devanagari, "
                    "Han, Hiragana, ..."
                )
        self._text = regex.compile(f"[{''.join(map(_property, (*self.names, *SHARED)))}]*")

    def __call__(self, piece: bytes) -> bool:
        text = piece.lstrip(CONTINUATION)
        head, tail = piece[: len(piece) - len(text)], _unfinished(text)
        try:
            whole = text[: len(text) - len(tail)].decode("utf-8")
        except UnicodeDecodeError:  # bytes that are in no text
            return False
        return all(part in self._parts for part in (head, tail) if part) and bool(self._text.fullmatch(whole))

    @cached_property
    def _parts(self) -> set[bytes]:
        """All that a longer piece can have of one character that passes, without having the whole of it."""
        every = (chr(i) for i in range(0x80, sys.maxunicode + 1) if not 0xD800 <= i < 0xE000)
        letters = [c.encode() for c in every if self._text.fullmatch(c)]
        return {c[i:j] for c in letters for i in range(len(c)) for j in range(i + 1, len(c) + 1) if j - i < len(c)}


CONTINUATION = bytes(range(0x80, 0xC0))
"""All bytes of a UTF-8 character but the first are of these."""


def _unfinished(text: bytes) -> bytes:
    """The character at the end of `text` of which bytes are missing."""
    start = len(text.rstrip(CONTINUATION)) - 1
    if start < 0:
        return b""
    first = text[start]
    length = 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)
    return text[start:] if len(text) - start < length else b""


def _property(name: str) -> str:
    return rf"\p{{Script_Extensions={name}}}"
