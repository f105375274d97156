"""What a cleaning step is, and how one is applied to every form of document. Nothing heavy is imported here."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable
from typing import Any, Protocol

from adapt.data.documents import Document

FORMS = ("text", "messages", "prompt", "response", "chosen", "rejected")


class Cleaner(Protocol):
    sequential: bool = False
    """False: a pure function of one document, run in worker processes. True: it remembers earlier documents, so it runs
    in one process, in source order."""

    def __call__(self, document: Document) -> Document | str:
        """The document, unchanged (the same object) or as a new one; or the reason why it is dropped (a str)."""
        ...


class SequentialCleaner(Cleaner, Protocol):
    """One that remembers: what it knows is an append-only list of 64-bit hashes, so that it can go on later."""

    sequential: bool = True
    memory: array
    """`array('Q')`, append-only: its length marks how far an interrupted run had come."""

    def restore(self, memory: array) -> None:
        """Go on from the `memory` of an earlier run."""
        ...


def map_strings(document: Document, change: Callable[[str], str]) -> Document:
    """`change` applied to every piece of text of a document; the same object when nothing changed. Roles and meta stay
    as they are."""
    changed: dict[str, Any] = {}
    for name in FORMS:
        value = getattr(document, name)
        if value is None:
            continue
        new = change(value) if isinstance(value, str) else [{**m, "content": change(m["content"])} for m in value]
        if new != value:
            changed[name] = new
    return dataclasses.replace(document, **changed) if changed else document


def whole_text(document: Document) -> str:
    """All its pieces, a line break between them: what is judged as a whole."""
    return document.text if document.text is not None else "\n".join(document.strings())
