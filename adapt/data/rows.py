"""Token shards -> packed rows of fixed length, any of them at once. Legend: T tokens per row.

What shares a row is decided by packing.py; here a row gets its labels, positions, documents and weights. Preference
pairs: a sequence per row, chosen and rejected next to each other.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

import numpy as np

from adapt.data.batch import PAD, TARGET
from adapt.data.packing import PACKINGS, ByteWindows, Single
from adapt.data.pairs import Fitted
from adapt.data.permute import Permutation, shuffled, uniform
from adapt.data.shards import TokenShards
from adapt.errors import UserError

Row = dict[str, np.ndarray]
"""input_ids, labels, doc_ids, position_ids [T] int64; role [T] int8; loss_weight [T] float32; pair_index scalar."""
REPEATS = 1
"""Last word of the hash that decides which documents come once more, apart from the one that orders them."""


class Rows:
    def __init__(
        self,
        shards: TokenShards,
        seq_len: int,
        seed: int,
        *,
        packing: Literal["windows", "best_fit"] = "windows",
        cross_document_attention: bool = False,
        document_weight_as: Literal["repeat", "loss"] | None = None,
        row_bytes: int | None = None,
        byte_lengths: np.ndarray | None = None,
    ):
        """`document_weight_as=None` reads every document once, whatever its weight. `row_bytes`: rows are cut by bytes
        of text instead of by tokens, with `byte_lengths` [V] of each token, and are as long as the longest needs.
        Raises UserError where the data does not allow what is asked for."""
        self.shards, self.seq_len, self.seed = shards, seq_len, seed
        self.unit = 2 if shards.has_pairs else 1
        """Rows that only make sense together."""
        self.pairs: Fitted | None = None
        """How preference pairs are made to fit, where these are some."""
        self.cross_document_attention = cross_document_attention
        weights = None if document_weight_as is None else _weights(shards)
        self._factors = loss_factors(weights, shards) if document_weight_as == "loss" and weights is not None else None
        """[documents] float32 factor of a document's token losses."""
        self._facts = [seq_len, seed, packing, cross_document_attention]
        if weights is not None:
            self._facts += [document_weight_as, shards.manifest["files"]["weights.npy"]["sha256"]]
        offsets = np.asarray(shards.document_offsets)
        if shards.has_pairs:
            self._refuse_for_pairs(packing, weights)
            self.pairs = Fitted.of(shards, seq_len)
            self.packing = Single(self.pairs.order, offsets, self.pairs.cut)
        else:
            documents = np.arange(shards.num_documents)
            if weights is not None and document_weight_as == "repeat":
                documents = np.repeat(documents, repeats(weights, seed))
            order = documents[shuffled(len(documents), seed)]
            if not (offsets[1:] - offsets[:-1])[order].any():
                why = "" if weights is None else "; the documents' weights leave none over"
                raise UserError(f"{shards.label}: there is no token to train on{why}")
            if row_bytes is None:
                self.packing = PACKINGS[packing](order, offsets, seq_len)
            else:
                lengths = byte_lengths[shards.tokens(0, shards.num_tokens)]
                self.packing = ByteWindows(order, offsets, seq_len, token_bytes=lengths, row_bytes=row_bytes)
                self.seq_len = self.packing.longest

    @property
    def fingerprint(self) -> str:
        """Of everything that decides which tokens stand in which row, and how much they count."""
        return hashlib.sha256(json.dumps([self.shards.fingerprint, *self._facts]).encode()).hexdigest()

    @property
    def num_units(self) -> int:
        return len(self) // self.unit

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        segments = self.packing.segments(index)
        row = padding(self.seq_len, self.shards.pad_id)
        at = 0
        for number, (document, start, stop) in enumerate(segments):
            size = stop - start
            here = slice(at, at + size)
            role = self.shards.roles(start, stop)
            row["input_ids"][here] = self.shards.tokens(start, stop)
            row["labels"][here] = np.where(role == TARGET, row["input_ids"][here], -100)
            if not (self.cross_document_attention and at):
                row["labels"][at] = -100  # nothing before it predicts it
            row["doc_ids"][here] = 0 if self.cross_document_attention else number
            row["position_ids"][here] = np.arange(size) + (at if self.cross_document_attention else 0)
            row["role"][here] = role
            if self.pairs is not None and self.pairs.cut[document]:
                self._begin_again(row, document)
            row["loss_weight"][here] = 1.0 if self._factors is None else self._factors[document]
            at += size
        row["doc_ids"][at:] = 1 if self.cross_document_attention else len(segments)
        row["position_ids"][at:] = np.arange(self.seq_len - at)
        if self.unit == 2:
            row["pair_index"] = self.pairs.order[index] // 2
        return row

    def _begin_again(self, row: Row, document: int) -> None:
        """A prompt that lost its beginning keeps its begin-of-text token."""
        start = int(self.shards.document_offsets[document])
        if (first := int(self.shards.tokens(start, start + 1)[0])) == self.shards.manifest.get("bos_id"):
            row["input_ids"][0] = first

    @property
    def facts(self) -> dict[str, int]:
        """For the manifest, besides what the shards say of themselves: what became of pairs longer than a row."""
        if self.pairs is None:
            return {}
        return {
            "row_tokens": self.seq_len,
            "pairs_too_long": self.pairs.num_too_long,
            "prompts_cut": self.pairs.num_cut,
        }

    def shuffled(self, position: int) -> tuple[int, int]:
        """(epoch, row) of the `position`-th row of an endless reading, each epoch in an order of its own."""
        unit, member = divmod(position, self.unit)
        epoch, index = divmod(unit, self.num_units)
        return epoch, self._permutation(epoch)[index] * self.unit + member

    def _permutation(self, epoch: int) -> Permutation:
        return Permutation(self.num_units, self.seed, epoch)

    def _refuse_for_pairs(self, packing: str, weights: np.ndarray | None) -> None:
        asked = {
            "data.packing": packing != "windows",
            "data.cross_document_attention": self.cross_document_attention,
            "document weights": weights is not None,
        }
        if wrong := [name for name, is_asked in asked.items() if is_asked]:
            raise UserError(
                f"{self.shards.label}: preference pairs have a row for each sequence, so there is nothing for "
                f"{' and '.join(wrong)} to do; leave it out"
            )


def _weights(shards: TokenShards) -> np.ndarray | None:
    """[documents] float64."""
    weights = shards.document_weights()
    if weights is None:
        return None
    weights = np.asarray(weights, np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        worst = int(np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))[0])
        raise UserError(
            f"{shards.label}: document {worst} has the weight {weights[worst]}; weights are finite numbers, 0 or more"
        )
    return weights


def repeats(weights: np.ndarray, seed: int) -> np.ndarray:
    """[documents] int64, how often each occurs in an epoch: floor(w), and once more with probability w - floor(w).
    Its expectation is w, so the expected share of tokens is what the weights say."""
    whole = np.floor(weights)
    return (whole + (uniform(len(weights), seed, REPEATS) < weights - whole)).astype(np.int64)


def loss_factors(weights: np.ndarray, shards: TokenShards) -> np.ndarray:
    """[documents] float32: the weights, scaled so that their mean over the source's tokens is 1."""
    total = float(weights @ np.diff(np.asarray(shards.document_offsets)))
    if not total:
        raise UserError(f"{shards.label}: every document has the weight 0, so nothing would be learned from it")
    return (weights * (shards.num_tokens / total)).astype(np.float32)


def padding(seq_len: int, pad_id: int) -> Row:
    """A row with nothing in it."""
    return {
        "input_ids": np.full(seq_len, pad_id, np.int64),
        "labels": np.full(seq_len, -100, np.int64),
        "doc_ids": np.zeros(seq_len, np.int64),
        "position_ids": np.arange(seq_len, dtype=np.int64),
        "role": np.full(seq_len, PAD, np.int8),
        "loss_weight": np.zeros(seq_len, np.float32),
        "pair_index": np.int64(-1),
    }
