"""What an extension must not have broken, proved on the result itself: each check returns what it found wrong."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapt.tokenization.byte_bpe import ByteBpe, unreachable

PROBE = "Prova: coração, naïve, 日本, 🙂, e\u0301, 1234,  \t\n x"


def ids_kept(old: ByteBpe, new: ByteBpe) -> list[str]:
    """Every old token, specials included, has its id; old merges are the first of the new ones; no id is used twice."""
    found = [
        f"{token!r} had the id {i} and has {new.ids.get(token)}"
        for token, i in old.ids.items()
        if new.ids.get(token) != i
    ]
    if new.merges[: len(old.merges)] != old.merges:
        found.append("the old merges are not the first ones of the new")
    if len(set(new.ids.values())) != len(new.ids):
        found.append("two tokens share an id")
    loaded = new.tokenizer()
    found += [
        f"{token!r} has the id {i} and is loaded as {loaded.token_to_id(token)}"
        for token, i in new.ids.items()
        if loaded.token_to_id(token) != i
    ]
    return found


def new_tokens_reached(old: ByteBpe, new: ByteBpe) -> list[str]:
    """The new tokens that their own bytes do not give."""
    return unreachable(new, [token for token, i in new.vocab.items() if i >= old.next_id])


def boundaries_only_removed(old: ByteBpe, new: ByteBpe, texts: Sequence[str]) -> list[str]:
    """Texts where the new tokenizer cuts at a byte at which the old one does not."""
    sides = []
    for bpe in (old, new):
        encoded = bpe.tokenizer().encode_batch_fast(list(texts), add_special_tokens=False)
        lengths = token_bytes(bpe)
        sides.append([np.cumsum(lengths[e.ids]) for e in encoded])
    return [
        repr(text[:60])
        for text, before, after in zip(texts, *sides, strict=True)
        if not np.isin(after, before, assume_unique=False).all()
    ]


def token_bytes(bpe: ByteBpe) -> np.ndarray:
    """[largest id + 1] int64: bytes of text that each token stands for."""
    lengths = np.zeros(bpe.next_id, np.int64)
    for token, i in bpe.vocab.items():
        if token not in bpe.added:
            lengths[i] = len(token)
    for token, i in bpe.added.items():
        lengths[i] = len(token.encode())
    return lengths


def specials_unchanged(old: Path, new: Path) -> list[str]:
    """Of two tokenizer folders: special tokens, their ids and where they are put, chat template, sides and lengths."""
    from adapt.pretrained.load import read_tokenizer

    before, after = read_tokenizer(old), read_tokenizer(new)
    facts = {
        "special tokens": lambda t: t.special_tokens_map,
        "special ids": lambda t: t.all_special_ids,
        "added tokens": lambda t: {i: (a.content, a.special) for i, a in t.added_tokens_decoder.items()},
        "chat template": lambda t: t.chat_template,
        "model_max_length": lambda t: t.model_max_length,
        "padding side": lambda t: t.padding_side,
        "truncation side": lambda t: t.truncation_side,
        "tokens put around a text": lambda t: _around(t, t(PROBE)["input_ids"]),
    }
    return [
        f"{name}: {fact(before)!r:.200} became {fact(after)!r:.200}"
        for name, fact in facts.items()
        if fact(before) != fact(after)
    ]


def _around(tokenizer: Any, ids: list[int]) -> tuple[list[int], list[int]]:
    plain = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    start = next(i for i in range(len(ids) + 1) if ids[i : i + len(plain)] == plain)
    return ids[:start], ids[start + len(plain) :]


CLEAN_PROCESS = """
import hashlib, json, sys
from tokenizers import Tokenizer
from transformers import AutoTokenizer
folder, texts = sys.argv[1], json.load(sys.stdin)
loaded = AutoTokenizer.from_pretrained(folder)
raw = Tokenizer.from_file(folder + "/tokenizer.json")
ids = [[loaded(t, add_special_tokens=False)["input_ids"] for t in texts],
       [e.ids for e in raw.encode_batch(texts, add_special_tokens=False)]]
print(json.dumps([hashlib.sha256(json.dumps(i).encode()).hexdigest() for i in ids] + [len(loaded)]))
"""


def reloaded_elsewhere(folder: Path, bpe: ByteBpe, texts: Sequence[str]) -> list[str]:
    """A process that has only the folder, with transformers' AutoTokenizer and with `tokenizers`, gives the ids we have."""
    texts = [PROBE, *texts]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN_PROCESS, str(folder.resolve())],
        input=json.dumps(texts), capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if done.returncode:
        return [f"it cannot be loaded: {' '.join(done.stderr.split())[-300:]}"]
    ids = [e.ids for e in bpe.tokenizer().encode_batch(texts, add_special_tokens=False)]
    ours = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    auto, raw, size = json.loads(done.stdout.splitlines()[-1])
    found = [
        f"{name} gives other ids" for name, hashed in (("AutoTokenizer", auto), ("tokenizers", raw)) if hashed != ours
    ]
    if size != len(bpe.ids):
        found.append(f"AutoTokenizer has {size:,d} tokens, not {len(bpe.ids):,d}")
    return found


def prove(
    old: ByteBpe, new: ByteBpe, base: Path, folder: Path, texts: Sequence[str], *, coarsens: bool
) -> dict[str, list[str]]:
    """What was checked -> what was found wrong (nothing, if all is well). `coarsens`: the method promises that new tokens
    are reached and boundaries only removed."""
    num_tokens, num_merges, num_new = len(old.ids), len(old.merges), new.next_id - old.next_id
    proofs = {
        f"all {num_tokens:,d} old tokens keep their ids, and their {num_merges:,d} merges their ranks": ids_kept(
            old, new
        )
    }
    if coarsens:
        proofs[f"all {num_new:,d} new tokens are reached by merges"] = new_tokens_reached(old, new)
        claim = f"in {len(texts):,d} texts, token boundaries are only removed"
        proofs[claim] = boundaries_only_removed(old, new, texts)
    proofs["special tokens and chat template are as they were"] = specials_unchanged(base, folder)
    proofs["in another process, AutoTokenizer and tokenizers give the same ids"] = reloaded_elsewhere(
        folder, new, texts
    )
    return proofs
