"""Steps run one after the other over documents: what preparation does, without its processes and counts."""

from __future__ import annotations

from collections import Counter

from adapt.components import CleanerChoice
from adapt.config.decode import decode
from adapt.data.documents import BadRecord, Document


def step(choice):
    return decode(choice, CleanerChoice).build()


def clean(documents, choices) -> tuple[list[Document], dict[str, Counter]]:
    """(documents kept, reasons by step for those dropped). `choices`: as a recipe writes them, or CleanerChoices."""
    steps = [(c.name, c.build()) if isinstance(c, CleanerChoice) else (str(c), step(c)) for c in choices]
    dropped = {name: Counter() for name, _ in steps}
    kept = []
    for document in documents:
        if isinstance(document, BadRecord):
            dropped.setdefault("read", Counter())["malformed"] += 1
            continue
        for name, cleaner in steps:
            document = cleaner(document)
            if isinstance(document, str):
                dropped[name][document] += 1
                break
        else:
            kept.append(document)
    return kept, dropped


def text(document: Document) -> str:
    assert document.text is not None
    return document.text
