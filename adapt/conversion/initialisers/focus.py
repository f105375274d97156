"""A new token starts as a sparse mix of the old tokens that occur where it occurs (Dobler and de Melo 2023, "FOCUS:
Effective Embedding Initialization for Monolingual Specialization of Multilingual Models").

The weights are sparsemax(cos(a_t, a_j)) over the old tokens j that are trained and frequent in the texts, the same for
embedding and head. The paper's vectors a are fastText's; here they are those of `adapt.conversion.token_vectors`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapt.components import initialisers
from adapt.conversion.initialisers.base import Initialiser, Table
from adapt.conversion.texts import Extension, Text, learned
from adapt.conversion.token_vectors import count_pairs, occurrences, ppmi, truncated_svd
from adapt.data.noise import generator
from adapt.errors import Problem, UserError

ROWS = 256
"""New tokens whose similarities to all old ones are in memory at a time."""
FIRST = 64
"""Most supports are smaller than this."""
KEY = 0xF0C5
"""Of the noise that the decomposition starts from."""
log = logging.getLogger("adapt.conversion")


@dataclass(frozen=True, kw_only=True)
class FocusConfig:
    texts: tuple[Text, ...] = ()
    """Where tokens are seen in use. Empty: the training data, but for replay."""
    max_tokens: int = 10_000_000
    """About so many tokens are read, the same share of each text."""
    min_count: int = 10
    """A token that occurs less often has no vector: an old one is nobody's neighbour then, and a new one starts like a
    random trained row."""
    window: int = 5
    """Tokens that are this near occur together; the nearer, the more it counts (window + 1 - distance)."""
    dim: int = 100
    """Dimensions of the vectors; fewer where the texts have fewer tokens."""

    def problems(self, recipe) -> Iterator[Problem]:
        for name in ("max_tokens", "min_count", "window", "dim"):
            if (value := getattr(self, name)) < 1:
                yield Problem("", f"{name}={value} must be 1 or more; {getattr(FocusConfig, name):,d} is the default")
        if not self.texts and not learned(recipe):
            yield Problem(
                "", "all of data.train is replay, so there is no text of the new tokens; name some in `texts`"
            )
        for i, text in enumerate(self.texts):
            try:
                text.source.build()
            except UserError as error:
                yield from (Problem("", f"texts[{i}].source: {p}") for p in error.problems)


@dataclass(frozen=True, eq=False)
class Neighbours:
    """What each of M new tokens is a mix of."""

    tokens: Tensor
    """[M]: which of the N new tokens have a vector."""
    offsets: Tensor
    """[M]: where each one's neighbours begin below."""
    old: Tensor
    """[neighbours]: old ids."""
    weights: Tensor
    """[neighbours] float64, above 0; those of a token add up to 1."""

    @classmethod
    def of(cls, tokens: Tensor, new: Tensor, overlap: Tensor, old: Tensor) -> Neighbours:
        """Of unit vectors [M, k] of new tokens, and [J, k] of the old ones with these ids [J]."""
        sizes, places, weights = [], [], []
        for rows in new.split(ROWS):
            mix = sparsemax(rows @ overlap.T)
            found = mix.nonzero(as_tuple=True)
            sizes.append((mix > 0).sum(1))
            places.append(old[found[1]])
            weights.append(mix[found])
        ends = torch.cat(sizes).cumsum(0)
        return cls(tokens, torch.cat([ends.new_zeros(1), ends[:-1]]), torch.cat(places), torch.cat(weights))


def sparsemax(scores: Tensor) -> Tensor:
    """[n, J]: the point of the simplex that is nearest to each row (Martins and Astudillo 2016, algorithm 1)."""
    first = min(FIRST, scores.shape[1])
    while True:
        top = scores.topk(first, dim=1).values
        sums = top.cumsum(1) - 1
        support = (top * torch.arange(1, first + 1, device=top.device) > sums).sum(1, keepdim=True)
        if first == scores.shape[1] or int(support.max()) < first:
            return (scores - sums.gather(1, support - 1) / support).clamp(min=0)
        first = min(8 * first, scores.shape[1])


class Focus:
    def __init__(self, config: FocusConfig):
        self.config = config
        self._found: tuple[Extension, Neighbours] | None = None

    def __call__(self, table: Table) -> Tensor:
        neighbours = self.neighbours(table)
        spread = table.rows[table.trained].std(0, correction=0)
        found = table.mean + table.normal() * spread
        if len(neighbours.tokens):
            found[neighbours.tokens] = torch.nn.functional.embedding_bag(
                neighbours.old.to(table.rows.device),
                table.rows,
                neighbours.offsets.to(table.rows.device),
                mode="sum",
                per_sample_weights=neighbours.weights.to(table.rows),
            )
        return found

    def neighbours(self, table: Table) -> Neighbours:
        """The same for both sides of an untied model: the texts are read once."""
        if table.extension is None:
            raise UserError("focus learns from texts, and this table says nothing of where they are")
        if self._found is None or self._found[0] is not table.extension:
            self._found = (table.extension, self._read(table))
        return self._found[1]

    def _read(self, table: Table) -> Neighbours:
        config, extension = self.config, table.extension
        documents = extension.documents(config.texts, config.max_tokens)
        new = np.asarray(extension.ids, np.int64)
        old = np.flatnonzero(table.trained.cpu().numpy())
        old = old[~np.isin(old, new)]
        counts = occurrences(documents, int(max(new.max(), old.max())) + 1)
        vocabulary = np.union1d(new[counts[new] >= config.min_count], old[counts[old] >= config.min_count])
        self._refuse_few(counts, old, new)
        pairs = count_pairs(documents, vocabulary, config.window)
        vectors = truncated_svd(ppmi(pairs, len(vocabulary)), config.dim, generator(table.seed, KEY))
        size = vectors.norm(dim=1)
        known = (size > 1e-6 * size.max()).numpy()  # a token may be frequent and tell nothing of its neighbours
        vectors = torch.nn.functional.normalize(vectors, dim=1)
        is_new = np.isin(vocabulary, new)
        asked, overlap = known & is_new, known & ~is_new
        if not asked.any() or not overlap.any():
            what = "no token of the texts has neighbours of its own: the texts are too short, or all the same"
            raise UserError(Problem("texts", what))
        log.info(
            "focus: %s of %s new tokens have a vector, from %s tokens of text; %s old ones are their neighbours",
            f"{asked.sum():,d}", f"{len(new):,d}", f"{counts.sum():,d}", f"{overlap.sum():,d}",
        )  # fmt: skip
        places = torch.from_numpy(np.searchsorted(new, vocabulary[asked]))
        return Neighbours.of(places, vectors[asked], vectors[overlap], torch.from_numpy(vocabulary[overlap]))

    def _refuse_few(self, counts: np.ndarray, old: np.ndarray, new: np.ndarray) -> None:
        if not counts.any():
            raise UserError(Problem("texts", "there is no text in them; name others"))
        for ids, whose in ((new, "new"), (old, "old")):
            if (most := counts[ids].max()) < self.config.min_count:
                what = (
                    f"{self.config.min_count}: no {whose} token occurs so often in the {counts.sum():,d} tokens of text; "
                    f"the most frequent one does {most:,d} times. Lower it, or give more text of what the tokenizer was "
                    "extended for"
                )
                raise UserError(Problem("min_count", what))


@initialisers.register("focus")
def focus(config: FocusConfig) -> Initialiser:
    return Focus(config)
