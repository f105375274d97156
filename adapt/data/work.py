"""What is done to each document alone, whoever does it: this process, or workers that were given the same `Work`."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from adapt.components import CleanerChoice
from adapt.data.counts import Size, Tally, size_of
from adapt.data.dedup import minhash, normal_pieces, text_hash
from adapt.data.document_weights import DocumentWeight
from adapt.data.documents import BadRecord, Document
from adapt.data.encode import Encoded, Encoder, of_text
from adapt.data.ngrams import Filter, ngrams, word_hashes

EMPTY, EMPTIED = "empty", "nothing is left"
CONTAMINATED = "decontaminate"


@dataclass
class Keys:
    """What documents are compared by, one entry per document."""

    hashes: list[int] = field(default_factory=list)
    signatures: list[np.ndarray] = field(default_factory=list)
    """MinHash, with near-deduplication."""
    grams: list[np.ndarray] = field(default_factory=list)
    """n-grams, of held-out sets."""


@dataclass
class Cleaned:
    kept: list[int]
    """Places, in the batch given, of the documents that are left."""
    changed: dict[int, Document]
    """The new document of each place that changed."""
    sizes: list[Size]
    """Of the documents that are left."""
    tallies: list[Tally]
    keys: Keys | None


@dataclass
class Work:
    """Pickled for workers. The steps that remember are in `cleaners` too, so that steps go by their place in it."""

    cleaners: tuple[CleanerChoice, ...]
    near: bool
    """Whether signatures are wanted."""
    n: int | None
    """Words of the n-grams that held-out text is looked for by; None: no decontamination."""
    own_grams: bool
    """Whether this is a held-out set, whose n-grams are wanted."""
    held_out: tuple[tuple[str, Path], ...]
    """(label, file of sorted n-grams) that documents are compared with."""
    weight: str | None
    encoder: Encoder

    def __getstate__(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k in self.__dataclass_fields__ and k != "encoder"}
        plain = self.encoder.plain
        return {**own, "plain": plain, "pickled": pickle.dumps(self.encoder.tokenizer)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.pickled = state.pop("pickled")
        vars(self).update(state)

    def __getattr__(self, name: str) -> Any:
        """In a worker the whole tokenizer is built where a document needs it: it imports a lot."""
        if name == "encoder" and "pickled" in vars(self):
            self.encoder = Encoder(pickle.loads(self.pickled))
            return self.encoder
        if name == "plain":
            return self.encoder.plain
        raise AttributeError(name)

    def step(self, place: int):
        """The cleaner at a place."""
        return self._steps[place]

    @cached_property
    def _steps(self) -> list[Any]:
        return [choice.build() for choice in self.cleaners]

    @cached_property
    def _weight(self) -> DocumentWeight | None:
        return None if self.weight is None else DocumentWeight(self.weight)

    @cached_property
    def _filters(self) -> list[tuple[str, Filter]]:
        return [(label, Filter(np.load(file, mmap_mode="r"))) for label, file in self.held_out]

    def clean(
        self, documents: list[Document], sizes: list[Size] | None, first: int, last: int, finish: bool
    ) -> Cleaned:
        """Steps `first` to `last` (not included). Without `sizes` the documents come straight from the source, and
        those without any text are dropped. `finish`: compare with held-out data, and give the keys."""
        tallies: list[Tally] = []
        if sizes is None:
            tallies.append(Tally("read"))
            sizes = [size_of(d) for d in documents]
            for size in sizes:
                tallies[0].enter(size)
                if size[1]:
                    tallies[0].leave(size)
                else:
                    tallies[0].dropped[EMPTY] += 1
        state = [(i, d, s) for i, (d, s) in enumerate(zip(documents, sizes, strict=True)) if s[1]]
        for place in range(first, last):
            tally = Tally(self.cleaners[place].name, changes=True)
            tallies.append(tally)
            step = self._steps[place]
            state = [(i, *left) for i, d, s in state if (left := apply(step, d, s, tally)) is not None]
        keys = None
        if finish:
            state, keys, tally = self._finish(state)
            tallies += [tally] if tally is not None else []
        changed = {i: d for i, d, _ in state if d is not documents[i]}
        return Cleaned([i for i, _, _ in state], changed, [s for _, _, s in state], tallies, keys)

    def _finish(self, state: list) -> tuple[list, Keys, Tally | None]:
        texts = [list(normal_pieces(d)) for _, d, _ in state]
        keys, tally = Keys(), None
        if self.n is not None:
            documents = [word_hashes(*pieces) for pieces in texts]
            if self.held_out:
                tally = Tally(CONTAMINATED)
                reasons = self._contaminated(documents)
                for (_, _, size), reason in zip(state, reasons, strict=True):
                    tally.enter(size)
                    if reason is None:
                        tally.leave(size)
                    else:
                        tally.dropped[reason] += 1
                left = [i for i, reason in enumerate(reasons) if reason is None]
                state, texts = [state[i] for i in left], [texts[i] for i in left]
            if self.own_grams:
                keys.grams = [np.concatenate([g for g, _ in ngrams([d], self.n)]) for d in documents]
        keys.hashes = [text_hash(*pieces) for pieces in texts]
        keys.signatures = [minhash(*pieces) for pieces in texts] if self.near else []
        return state, keys, tally

    def _contaminated(self, documents: list[np.ndarray]) -> list[str | None]:
        reasons: list[str | None] = [None] * len(documents)
        for grams, owner in ngrams(documents, self.n):
            for label, shared in self._filters:
                for i in np.unique(owner[shared(grams)]).tolist():
                    reasons[i] = reasons[i] or contaminated(self.n, label)
        return reasons

    def tokenise(self, documents: list[Document]) -> tuple[list[list[Encoded] | BadRecord], list[float] | None]:
        """The sequences of each document, and its weight where the dataset has one."""
        weights = None if self._weight is None else [self._weight(d) for d in documents]
        if self.plain.is_fast and all(d.text is not None for d in documents):
            texts = [d.text for d in documents]
            results = [
                [of_text(self.plain, t, ids)]
                for t, ids in zip(texts, self.plain.ids(texts) if texts else (), strict=True)
            ]
        else:
            results = list(self.encoder.encode(documents))
        return [_compact(r) for r in results], weights


def contaminated(n: int, label: str) -> str:
    return f"{n}-gram also in held-out data ({label})"


def apply(step: Any, document: Document, size: Size, tally: Tally) -> tuple[Document, Size] | None:
    """One cleaning step on one document, counted; None: dropped."""
    tally.enter(size)
    result = step(document)
    if isinstance(result, str):
        tally.dropped[result] += 1
        return None
    if result is not document:
        tally.changed += 1
        size = size_of(result)
        if not size[1]:
            tally.dropped[EMPTIED] += 1
            return None
    tally.leave(size)
    return result, size


def _compact(result: list[Encoded] | BadRecord) -> list[Encoded] | BadRecord:
    """As arrays, which are small to send."""
    if isinstance(result, BadRecord):
        return result
    return [Encoded(_array(e.tokens, np.int32), _array(e.roles, np.int8), e.num_bytes) for e in result]


def _array(values: Sequence[int] | None, dtype) -> np.ndarray | None:
    return None if values is None else np.asarray(values, dtype)
