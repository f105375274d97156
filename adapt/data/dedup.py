"""Which documents were seen before: exactly, nearly, or in the held-out data."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from collections.abc import Iterator
from functools import cache

import numpy as np

from adapt.data.documents import Document
from adapt.data.plain_text import pieces

PERMUTATIONS = 128
SHINGLE = 5
WORDS = re.compile(r"\w+")

EXACT, NEAR, HELD_OUT = "exact duplicate", "near duplicate", "also in held-out data"


def normalised(document: Document) -> str:
    """Case, spacing and Unicode composition do not make another document."""
    return "".join(normal_pieces(document))


def normal_pieces(document: Document) -> Iterator[str]:
    """The normalised text in pieces of about a million characters, so that a huge document is never split into all its
    words at once."""
    before, has_begun = " ", False
    for string in document.strings():
        for number, piece in enumerate(pieces(string)):
            text = " ".join(unicodedata.normalize("NFC", piece).casefold().split())
            is_apart = not number or before[-1:].isspace() or piece[:1].isspace()
            if text:
                yield f" {text}" if has_begun and is_apart else text
                has_begun = True
            before = piece


def text_hash(*texts: str) -> int:
    """64 bits of the texts one after the other."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        digest.update(text.encode())
    return int.from_bytes(digest.digest(), "little")


class Deduplicator:
    """Memory: about 0.1 KB per document kept, and 2 KB more with near-deduplication."""

    def __init__(self, exact: bool, near: float | None):
        self.exact, self.near = exact, near
        self.hashes = array("Q")
        """Of the documents kept, for the training data to be compared with."""
        self.signatures: list[np.ndarray] = []
        self._seen: set[int] = set()
        self._held_out: dict[int, str] = {}
        self._held_out_signatures: list[str] = []
        """Which set each of the first signatures is of."""
        if near is not None:
            from datasketch import MinHashLSH

            self._index = MinHashLSH(threshold=near, num_perm=PERMUTATIONS)

    def hold_out(self, label: str, hashes: np.ndarray, signatures: np.ndarray | None) -> None:
        """Documents of held-out data, which must not be trained on. Called before the first `reason` or `restore`."""
        if self.exact:
            self._held_out.update(dict.fromkeys(hashes.tolist(), label))
        if self.near is not None and signatures is not None:
            for signature in signatures:
                self._remember(np.asarray(signature))
            self._held_out_signatures += [label] * len(signatures)

    def restore(self, hashes: np.ndarray, signatures: np.ndarray | None) -> None:
        """Go on after documents that were kept in an interrupted run."""
        self.hashes.extend(hashes.tolist())
        if self.exact:
            self._seen.update(self.hashes)
        if self.near is not None and signatures is not None:
            for signature in signatures:
                self._remember(np.array(signature))

    def reason(self, key: int, signature: np.ndarray | None) -> str | None:
        """Why to drop the document with this hash and signature; None: it is new, and remembered from now on."""
        if key in self._held_out:
            return held_out(self._held_out[key])
        if self.exact and key in self._seen:
            return EXACT
        if self.near is not None:
            closest = self._closest(signature)
            if closest is not None:
                sets = self._held_out_signatures
                return held_out(sets[closest]) if closest < len(sets) else NEAR
            self._remember(signature)
        if self.exact:
            self._seen.add(key)
        self.hashes.append(key)
        return None

    def kept(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Hashes [n] and signatures [n, 128] of documents kept, by number."""
        hashes = np.array(self.hashes[start:stop], np.uint64)
        if self.near is None:
            return hashes, None
        first = len(self._held_out_signatures)
        own = self.signatures[first + start : first + stop]
        return hashes, np.stack(own) if own else np.empty((0, PERMUTATIONS), np.uint32)

    def _closest(self, signature: np.ndarray) -> int | None:
        """Number of the lowest remembered document that is at least `near` similar."""
        hits = self._index.query(_as_minhash(signature))
        alike = [i for i in hits if np.mean(self.signatures[i] == signature) >= self.near]
        return min(alike, default=None)

    def _remember(self, signature: np.ndarray) -> None:
        self._index.insert(len(self.signatures), _as_minhash(signature))
        self.signatures.append(signature)


def held_out(label: str) -> str:
    return f"{HELD_OUT} ({label})"


def minhash(*texts: str) -> np.ndarray:
    """[128] uint32 signature of the 5-word shingles of the texts one after the other; the share of equal entries
    estimates the Jaccard index."""
    sketch = _empty().copy()
    before: list[str] = []
    for text in texts:
        words = before + WORDS.findall(text)
        shingles = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
        encoded = [s.encode() for s in sorted(shingles)]
        for start in range(0, len(encoded), 4096):  # bounds the (shingles x permutations) matrix of a long document
            sketch.update_batch(encoded[start : start + 4096])
        before = words[1 - SHINGLE :]
    return np.array(sketch.hashvalues, np.uint32)


def _as_minhash(signature: np.ndarray):
    sketch = _empty().copy()
    sketch.hashvalues = signature
    return sketch


@cache
def _empty():
    """Copied, because setting up the permutations anew would cost more than most documents do."""
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, scheme="affine32")  # signatures lie in the cache: the scheme must not change
