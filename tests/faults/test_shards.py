"""Prepared data that is damaged: opening it says so by name, or what is read from it is what was written.

Damaged checkpoints are in tests/distributed/test_checksums.py.
"""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest

from adapt.data.prepare import prepare
from adapt.data.shards import TokenShards
from adapt.errors import UserError
from tests.data.helpers import recipe, write_jsonl
from tests.recipes import WORDS


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    """With every column that there is: hashes and signatures of documents, weights, roles of tokens."""
    folder = tmp_path_factory.mktemp("whole")
    rng = random.Random(0)
    records = [
        {"messages": [{"role": role, "content": " ".join(rng.choices(WORDS, k=20))} for role in ("user", "assistant")]}
        for _ in range(20)
    ]
    source = f"jsonl:{write_jsonl(folder / 'chats.jsonl', records)}"
    data = {"cache": str(folder / "cache"), "near_dedup": 0.9}
    return prepare(recipe([{"source": source, "name": "chats"}], **data), tokenizer, progress=False).train[0]


def contents(shards: TokenShards) -> list[np.ndarray]:
    every = [shards.tokens(0, shards.num_tokens), shards.roles(0, shards.num_tokens)]
    every += [np.asarray(shards.document_offsets), np.asarray(shards.document_bytes)]
    return [*every, np.array([shards.pad_id, shards.has_pairs])]


def test_there_is_a_file_of_each_kind(whole):
    kinds = {name.partition("-")[0].partition(".")[0] for name in whole.manifest["files"]}
    assert {"tokens", "roles", "documents", "bytes"} <= kinds


@pytest.mark.parametrize("how", ["flipped", "truncated", "emptied", "gone", "longer"])
def test_any_damage_to_any_file_is_named(how, whole, tmp_path):
    rng = random.Random(how)
    for name in whole.manifest["files"]:
        folder = tmp_path / name
        shutil.copytree(whole.folder, folder)
        data = bytearray((folder / name).read_bytes())
        if how == "flipped":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif how == "truncated":
            del data[rng.randrange(1, len(data)) :]
        elif how == "emptied":
            data.clear()
        elif how == "longer":
            data += b"\0"
        (folder / name).write_bytes(data)
        if how == "gone":
            (folder / name).unlink()
        with pytest.raises(UserError, match=f"{name}: the prepared data is damaged"):
            TokenShards(folder)


def test_a_damaged_manifest_is_named_or_changes_nothing(whole, tmp_path):
    """Bits flipped anywhere, in numbers, names and words: never another token, never a traceback."""
    folder = tmp_path / "shards"
    shutil.copytree(whole.folder, folder)
    good, expected, rng = (whole.folder / "manifest.json").read_bytes(), contents(whole), random.Random(0)
    named = 0
    for _ in range(300):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (folder / "manifest.json").write_bytes(data)
        try:
            found = contents(TokenShards(folder))
        except UserError as error:
            named += "the prepared data is damaged" in str(error)
        else:
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert named > 100


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "{}", json.dumps({"files": {}}), "\xff"])
def test_a_manifest_that_is_none(text, whole, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(whole.folder, folder)
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="manifest.json: the prepared data is damaged"):
        TokenShards(folder)
