"""Train, validation and test parts that are disjoint by what documents say, not by where they lie.

A document's part follows from a hash of its whole text as it was read, before any cleaning, with case and spacing evened out
(as exact deduplication compares). So files may be reordered, renamed and added, and cleaning rules changed, without moving a
document to another part, and two copies of a text are never on two sides.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from adapt.data.dedup import normalised
from adapt.data.documents import Document

Part = Literal["train", "val", "test"]


@dataclass(frozen=True, kw_only=True)
class Split:
    val: float = 0.02
    """Fraction of the documents for validation."""
    test: float = 0.02
    """Fraction of the documents for the final test."""

    def __post_init__(self) -> None:
        if min(self.val, self.test) < 0 or self.val + self.test >= 1:
            raise ValueError(f"val={self.val} and test={self.test} are fractions that leave something for training")

    def part(self, place: float) -> Part:
        """The part of a document at `place` in [0, 1): training is the beginning, so that it only ever loses to a larger
        validation or test part, and the test part, at the end, does not depend on the validation part's size."""
        if place >= 1 - self.test:
            return "test"
        return "val" if place >= 1 - self.test - self.val else "train"


def place(document: Document) -> float:
    """A number in [0, 1) out of the document's text: where in the split it falls."""
    return _fraction(normalised(document), b"split")


def share(document: Document) -> float:
    """Another one, independent of it, for reading a fraction of all documents. The text is hashed as it stands: cheaper,
    and nothing depends on copies being taken together."""
    return _fraction("\n".join(document.strings()), b"share")


def _fraction(text: str, purpose: bytes) -> float:
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8, person=purpose).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
