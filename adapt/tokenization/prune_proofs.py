"""What pruning must not have broken, proved on the result itself: each check returns what it found wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from adapt.tokenization import proofs
from adapt.tokenization.byte_bpe import ByteBpe, piece_bytes, unreachable


def ids_compact(old: ByteBpe, new: ByteBpe) -> list[str]:
    """Ids are 0, 1, 2, ... in the order of the old ones, and are loaded so; every added token and every byte is there."""
    order = sorted(new.ids, key=old.ids.__getitem__) if new.ids.keys() <= old.ids.keys() else []
    found = [f"{token!r} has the id {new.ids[token]}, not {i}" for i, token in enumerate(order) if new.ids[token] != i]
    if not order:
        found.append("it has tokens that the base has not")
    found += [f"{token!r} is gone" for token in old.added if token not in new.added]
    found += [f"the letter {piece!r} is gone" for piece in old.vocab if len(piece) == 1 and piece not in new.vocab]
    loaded = new.tokenizer()
    found += [
        f"{token!r} has the id {i} and is loaded as {loaded.token_to_id(token)}"
        for token, i in new.ids.items()
        if loaded.token_to_id(token) != i
    ]
    return found


def reached_as_before(old: ByteBpe, new: ByteBpe) -> list[str]:
    """Kept tokens that their own bytes gave, and now do not."""
    kept = [token for token in new.vocab if token not in new.added]
    before = set(unreachable(old, kept))
    return [repr(token) for token in unreachable(new, kept) if token not in before]


@dataclass(frozen=True)
class Kept:
    """What pruning did to texts."""

    texts: int
    other: int
    """They have other tokens now."""
    kept: int
    """All tokens they had are kept ones."""
    changed: list[str]
    """Of these, those that have other tokens all the same: none, or the pruning is wrong."""
    moved: list[str]
    """Texts, in which a boundary between tokens is gone."""
    fewer: list[str]
    """Texts that have fewer tokens than before."""


def compare(old: ByteBpe, new: ByteBpe, texts: Iterable[str], *, words: bool = False) -> Kept:
    """`words`: they are byte-level pieces, to be taken apart by the model alone, and not whole texts."""
    texts = list(texts)
    sides = []
    for bpe in (old, new):
        ignore_merges = bool(bpe.data["model"].get("ignore_merges"))
        tokenizer = bpe.segmenter(ignore_merges) if words else bpe.tokenizer()
        names = {i: token for token, i in bpe.ids.items()}
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        sides.append([[names[i] for i in e.ids] for e in encoded])
    other = kept = 0
    changed, moved, fewer = [], [], []
    for text, before, after in zip(texts, *sides, strict=True):
        if before == after:
            kept += 1
            continue
        other += 1
        if new.ids.keys() >= set(before):
            kept += 1
            changed.append(text)
        if len(after) < len(before):
            fewer.append(text)
        if not _ends(old, before) <= _ends(new, after):
            moved.append(text)
    return Kept(len(texts), other, kept, changed, moved, fewer)


def _ends(bpe: ByteBpe, tokens: Sequence[str]) -> set[int]:
    """Where tokens end, in bytes."""
    return set(accumulate(len(token.encode()) if token in bpe.added else len(piece_bytes(token)) for token in tokens))


def come_back(old: ByteBpe, new: ByteBpe, texts: Sequence[str]) -> list[str]:
    """Texts that the old tokenizer gave back when it decoded them, and the new one does not."""
    texts = [proofs.PROBE, *texts]
    sides = []
    for bpe in (old, new):
        tokenizer = bpe.tokenizer()
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        sides.append(tokenizer.decode_batch([e.ids for e in encoded], skip_special_tokens=False))
    return [repr(text[:60]) for text, before, after in zip(texts, *sides, strict=True) if before == text != after]


def specials_unchanged(old: Path, new: Path) -> list[str]:
    """Of two tokenizer folders: the same special tokens in the same places, whatever their ids."""
    from adapt.pretrained.load import read_tokenizer

    before, after = read_tokenizer(old), read_tokenizer(new)
    facts = {
        "special tokens": lambda t: t.special_tokens_map,
        "added tokens": lambda t: [(a.content, a.special) for _, a in sorted(t.added_tokens_decoder.items())],
        "chat template": lambda t: t.chat_template,
        "model_max_length": lambda t: t.model_max_length,
        "padding side": lambda t: t.padding_side,
        "truncation side": lambda t: t.truncation_side,
        "tokens put around a text": _around,
    }
    return [
        f"{name}: {fact(before)!r:.200} became {fact(after)!r:.200}"
        for name, fact in facts.items()
        if fact(before) != fact(after)
    ]


def _around(tokenizer: Any) -> list[str]:
    """What it makes of no text at all: the tokens of its template."""
    return tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])


def prove(
    old: ByteBpe,
    new: ByteBpe,
    base: Path,
    folder: Path,
    texts: Sequence[str],
    words: Sequence[str],
    *,
    strict: bool,
) -> dict[str, list[str]]:
    """What was checked -> what was found wrong (nothing, if all is well). `words` are those of all texts there are;
    `strict`: it was promised that boundaries are only added."""
    compared, whole = compare(old, new, words, words=True), compare(old, new, texts)
    claim = f"{compared.kept:,d} of {compared.texts:,d} different words have kept tokens only, and have the same ones"
    found = {
        f"{len(new.ids):,d} tokens are kept; their ids are 0 to {len(new.ids) - 1:,d}, in the old order": ids_compact(
            old, new
        ),
        "kept tokens are reached as before": reached_as_before(old, new),
        claim: [repr(text[:60]) for text in (*compared.changed, *whole.changed)],
    }
    if strict:
        found["boundaries between tokens are only added, so that no text has fewer tokens"] = [
            repr(text[:60]) for text in (*compared.moved, *whole.moved, *compared.fewer, *whole.fewer)
        ]
    found[f"{len(texts):,d} texts come back when decoded, as before"] = come_back(old, new, texts)
    found["special tokens and chat template are as they were"] = specials_unchanged(base, folder)
    found["in another process, AutoTokenizer and tokenizers give the same ids"] = proofs.reloaded_elsewhere(
        folder, new, texts
    )
    return found
