"""What every step of preparation did, as numbers that add up: in = out + dropped, and out is what the next step gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from adapt.data.documents import BadRecord, Document
from adapt.data.plain_text import pieces

LISTED = 100
"""Malformed records and parts that the manifest lists one by one."""
NOTED = {"licence": "licences", "part": "parts", "decoded_as": "encodings"}
"""Facts of documents that are counted, and the manifest's name of each table."""

Size = tuple[int, int]
"""UTF-8 bytes and words of a document."""


def size_of(document: Document) -> Size:
    num_bytes = num_words = 0
    for string in document.strings():
        num_bytes += len(string) if string.isascii() else len(string.encode())
        num_words += sum(len(piece.split()) for piece in pieces(string))
    return num_bytes, num_words


@dataclass
class Tally:
    """One step over some documents."""

    step: str
    changes: bool = False
    """Whether the step may change a text, so that it is told how many it did."""
    num_in: int = 0
    num_out: int = 0
    changed: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    words_in: int = 0
    words_out: int = 0
    dropped: Counter = field(default_factory=Counter)

    def enter(self, size: Size) -> None:
        self.num_in += 1
        self.bytes_in += size[0]
        self.words_in += size[1]

    def leave(self, size: Size) -> None:
        self.num_out += 1
        self.bytes_out += size[0]
        self.words_out += size[1]

    def add(self, other: Tally) -> None:
        for name in ("num_in", "num_out", "changed", "bytes_in", "bytes_out", "words_in", "words_out"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.dropped.update(other.dropped)

    def entry(self) -> dict[str, Any]:
        """As in the manifest."""
        return {
            "step": self.step,
            "in": self.num_in,
            "out": self.num_out,
            "dropped": dict(self.dropped),
            **({"changed": self.changed} if self.changes else {}),
            **{k: getattr(self, k) for k in ("bytes_in", "bytes_out", "words_in", "words_out")},
        }


class Counts:
    """Of all batches written so far."""

    def __init__(self, steps: Iterable[Tally]):
        self.steps = list(steps)
        self.bad: list[BadRecord] = []
        self.num_bad = 0
        self.documents = self.words = 0
        self.noted = {name: Counter() for name in NOTED}
        self.forms: set[bool] = set()
        """Whether documents are preference pairs (True) or not."""

    def add_bad(self, records: Iterable[BadRecord]) -> None:
        for record in records:
            self.num_bad += 1
            if len(self.bad) < LISTED:
                self.bad.append(record)

    def keep(self, document: Document, words: int) -> None:
        self.documents += 1
        self.words += words
        for name, counter in self.noted.items():
            value = document.meta.get(name)
            if value is not None:
                counter[str(value)] += 1

    def manifest(self) -> dict[str, Any]:
        return {
            **{NOTED[name]: _top(counter) for name, counter in self.noted.items() if counter or name != "decoded_as"},
            "steps": [tally.entry() for tally in self.steps],
            "bad_lines": {"count": self.num_bad, "listed": [{"where": b.where, "what": b.what} for b in self.bad]},
            "words": self.words,
            "documents": self.documents,
        }

    def state(self) -> dict[str, Any]:
        """As JSON, to go on from."""
        return {
            "steps": [vars(tally) for tally in self.steps],
            "bad": [[b.where, b.what] for b in self.bad],
            "num_bad": self.num_bad,
            "documents": self.documents,
            "words": self.words,
            "noted": self.noted,
            "forms": sorted(self.forms),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.steps = [Tally(**{**t, "dropped": Counter(t["dropped"])}) for t in state["steps"]]
        self.bad = [BadRecord(where, what) for where, what in state["bad"]]
        self.num_bad, self.documents, self.words = state["num_bad"], state["documents"], state["words"]
        self.noted = {name: Counter(found) for name, found in state["noted"].items()}
        self.forms = set(state["forms"])


def _top(counter: Counter) -> dict[str, int]:
    top = dict(counter.most_common(LISTED))
    rest = counter.total() - sum(top.values())
    return top | ({"(others)": rest} if rest else {})
