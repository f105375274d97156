"""Small data: shards from lists of ids, recipes from files."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapt.components import ObjectiveChoice
from adapt.config.decode import decode
from adapt.config.schema import Data, Recipe
from adapt.data.encode import Encoded
from adapt.data.shards import ShardWriter, TokenShards

_number = itertools.count()

PAD_ID = 9


def make_shards(
    folder: Path, documents: list[list[int]], roles=None, pairs=False, shard_tokens=50, weights=None
) -> TokenShards:
    """Shards of exactly these ids; small files, so that rows cross from one to the next."""
    place = folder / f"shards-{next(_number)}"
    place.mkdir(parents=True)
    writer = ShardWriter(place, np.dtype(np.uint32), shard_tokens)
    for document, role in zip(documents, roles or [None] * len(documents), strict=True):
        writer.add(Encoded(document, role, 3 * len(document)))
    arrays = {"hashes": np.zeros(0, np.uint64)}
    if weights is not None:
        arrays["weights"] = np.asarray(weights, np.float32)
    writer.finish({"label": "made-up", "pairs": pairs, "pad_id": PAD_ID}, arrays)
    return TokenShards(place)


def unique_documents(lengths: list[int]) -> list[list[int]]:
    """Documents in which every token occurs once over all."""
    numbers = itertools.count(100)
    return [list(itertools.islice(numbers, n)) for n in lengths]


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    pass


class Pairs:
    """An objective that compares."""

    pairs = True


def pairs_objective(config: PairsConfig, facts) -> Pairs:
    return Pairs()


def recipe(train: list, eval: tuple | list = (), objective: str = "next_token", **data) -> Recipe:
    """A recipe with this data section; only the data path reads it."""
    section = decode({"train": train, "eval": list(eval), **data}, Data)
    other = dict.fromkeys(("run", "model", "optimizer", "schedule", "trainer"))
    return Recipe(**other, data=section, objective=decode(objective, ObjectiveChoice))


def text_of(tokenizer, shards: TokenShards) -> list[str]:
    """The documents of shards as text."""
    offsets = shards.document_offsets
    return [tokenizer.decode(shards.tokens(a, b)) for a, b in itertools.pairwise(offsets.tolist())]


def roles_of(shards: TokenShards) -> list[list[int]]:
    return [shards.roles(a, b).tolist() for a, b in itertools.pairwise(shards.document_offsets.tolist())]
