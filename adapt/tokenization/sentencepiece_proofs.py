"""What an extension of a SentencePiece tokenizer must not have broken, proved on both of its files."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from adapt.errors import UserError
from adapt.tokenization import proofs
from adapt.tokenization.base import Method
from adapt.tokenization.byte_bpe import added_pattern
from adapt.tokenization.sentencepiece_model import BYTE, NORMAL, UNKNOWN, SentencePiece


def pieces_kept(old: SentencePiece, new: SentencePiece) -> list[str]:
    """Every old piece has its id, its score and its type, and the model its normaliser; tokenizer.json numbers all pieces
    as the model does, and loads them so."""
    found = []
    for i, (before, after) in enumerate(zip(old.proto.pieces, new.proto.pieces, strict=False)):
        if before.SerializeToString() != after.SerializeToString():
            found.append(f"the piece {before.piece!r} with the id {i} became {after.piece!r}, {after.score}")
    for spec in ("normalizer_spec", "trainer_spec", "denormalizer_spec"):
        if getattr(old.proto, spec).SerializeToString() != getattr(new.proto, spec).SerializeToString():
            found.append(f"the model's {spec} is another")
    found += [
        f"{token!r} had the id {i} and has {new.ids.get(token)}"
        for token, i in old.ids.items()
        if new.ids.get(token) != i
    ]
    loaded = new.tokenizer()
    found += [
        f"{token!r} has the id {i} in the model and {loaded.token_to_id(token)} in tokenizer.json"
        for token, i in new.ids.items()
        if loaded.token_to_id(token) != i
    ]
    if old.proto.trainer_spec.model_type == 2:
        kept = iter(new.merges)
        if not all(any(merge == other for other in kept) for merge in old.merges):
            found.append("the old merges of tokenizer.json are not in their old order")
    return found


def scores_below(old: SentencePiece, new: SentencePiece) -> list[str]:
    """New pieces have scores of their own, each below all old ones."""
    fresh = new.scores[old.next_id :]
    found = [
        f"{p.piece!r} has the score {p.score}" for p in new.proto.pieces[old.next_id :] if p.score >= min(old.scores)
    ]
    if len(set(fresh)) < len(fresh):
        found.append("two new pieces have the same score")
    return found


def boundaries(base: SentencePiece, texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each text (ends of its pieces, ends of characters inside unknown tokens), in bytes of the normalised text.

    A run of unknown characters is one token, for every model that does not know them: where a new piece gives one of them
    a token of its own, it cuts at the end of a character, which is no boundary that text ever had a token at."""
    processor, bytes_ = base.processor(), np.array([kind == BYTE for kind in base.types])
    unknown = base.types.index(UNKNOWN) if UNKNOWN in base.types else -1
    ids = processor.encode(list(texts), out_type=int)
    for pieces, found in zip(processor.encode(list(texts), out_type=str), ids, strict=True):
        lengths = [1 if bytes_[i] else len(piece.encode()) for piece, i in zip(pieces, found, strict=True)]
        ends = np.cumsum(np.array(lengths, np.int64))
        inside = [
            end - length + len(piece[:cut].encode())
            for piece, i, end, length in zip(pieces, found, ends, lengths, strict=True)
            if i == unknown
            for cut in range(1, len(piece))
        ]
        yield ends, np.array(inside, np.int64)


def boundaries_only_removed(old: SentencePiece, new: SentencePiece, texts: Sequence[str]) -> list[str]:
    """Texts where the new model cuts where the old one does not."""
    return [
        repr(text[:60])
        for text, (before, unknown), (after, _) in zip(
            texts, boundaries(old, texts), boundaries(new, texts), strict=True
        )
        if not np.isin(after, np.concatenate([before, unknown])).all()
    ]


def both_alike(base: SentencePiece, texts: Sequence[str]) -> list[str]:
    """Texts to which tokenizer.json gives other ids than the model. Those with a special token in them aside:
    tokenizer.json cuts it out, and the model takes it for text."""
    ids = base.processor().encode(list(texts), out_type=int)
    encoded = base.tokenizer().encode_batch_fast(list(texts), add_special_tokens=False)
    return [repr(text) for text, i, e in zip(texts, ids, encoded, strict=True) if i != e.ids]


def lines_of(base: SentencePiece, texts: Sequence[str]) -> list[str]:
    """The texts and their lines, without those that have an added token in them."""
    special = added_pattern(base.added)
    found = dict.fromkeys([*texts, *(line for text in texts for line in text.splitlines() if line.strip())])
    return [text for text in found if special is None or not special.search(text)]


def specials_unchanged(base: Path, folder: Path) -> list[str]:
    """As for byte-level tokenizers; where transformers has no class for the base's folder, the model's own specials are
    among its pieces, and all that there is."""
    try:
        return proofs.specials_unchanged(base, folder)
    except UserError:
        return []


CLEAN_PROCESS = """
import hashlib, json, sys
from sentencepiece import SentencePieceProcessor
loaded = SentencePieceProcessor(model_file=sys.argv[1])
ids = loaded.encode(json.load(sys.stdin), out_type=int)
print(json.dumps([hashlib.sha256(json.dumps(ids).encode()).hexdigest(), loaded.vocab_size()]))
"""


def model_elsewhere(folder: Path, base: SentencePiece, texts: Sequence[str]) -> list[str]:
    """A process that has only the model, with `sentencepiece`, gives the ids we have."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN_PROCESS, str((folder / base.file).resolve())],
        input=json.dumps(list(texts)), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        return [f"{base.file} cannot be loaded: {' '.join(done.stderr.split())[-300:]}"]
    ids = base.processor().encode(list(texts), out_type=int)
    hashed, size = json.loads(done.stdout.splitlines()[-1])
    found = [] if hashed == hashlib.sha256(json.dumps(ids).encode()).hexdigest() else ["sentencepiece gives other ids"]
    if size != len(base.vocab):
        found.append(f"{base.file} has {size:,d} pieces, not {len(base.vocab):,d}")
    return found


def warnings(old: SentencePiece, new: SentencePiece, texts: Sequence[str]) -> list[str]:
    """Lines on which the two files disagree, and old pieces that no text reaches any more."""
    found = []
    lines = lines_of(old, texts)
    if apart := both_alike(new, lines):
        found.append(
            f"tokenizer.json and {new.file} give other ids on {len(apart):,d} of {len(lines):,d} lines and texts, such as "
            f"{apart[0]:.60}: programs that read one file differ from those that read the other"
        )
    normal = [piece for piece, i in old.vocab.items() if old.types[i] == NORMAL]
    before, after = (set(model.bare_lost(normal)) for model in (old, new))
    if lost := sorted(after - before, key=old.vocab.__getitem__):
        found.append(
            f"{len(lost):,d} old pieces ({lost[0]!r} first) are no longer reached by their own text: new ones take it, and "
            "what the model learned of them is not used"
        )
    return found


def prove(
    old: SentencePiece, new: SentencePiece, base: Path, folder: Path, texts: Sequence[str], method: Method
) -> dict[str, list[str]]:
    """What was checked -> what was found wrong (nothing, if all is well). A line that the base's own two files disagree
    on is not held against its extension; the claim counts them."""
    num_new = new.next_id - old.next_id
    found = {f"all {len(old.ids):,d} old tokens keep their ids, their scores and their types": pieces_kept(old, new)}
    if method.reaches:
        claim = f"all {num_new:,d} new tokens are reached by their own text"
        found[claim] = new.unreachable(piece.piece for piece in new.proto.pieces[old.next_id :])
    lines = lines_of(old, texts)
    if method.coarsens:
        if num_new:
            found[f"the scores of new pieces are distinct and below {min(old.scores):,.0f}"] = scores_below(old, new)
        claim = f"in {len(lines):,d} lines and texts, token boundaries are only removed"
        found[claim] = boundaries_only_removed(old, new, lines)
    if method.reaches:
        apart = set(both_alike(old, lines))
        aside = f" (the base's own two files disagree on {len(apart):,d} others)" if apart else ""
        alike = [line for line in lines if repr(line) not in apart]
        claim = f"on {len(alike):,d} lines and texts, tokenizer.json and {new.file} give the same ids{aside}"
        found[claim] = both_alike(new, alike)
    found["special tokens and chat template are as they were"] = specials_unchanged(base, folder)
    claim = "in another process, AutoTokenizer, tokenizers and sentencepiece give the same ids"
    found[claim] = proofs.reloaded_elsewhere(folder, new, lines) + model_elsewhere(folder, new, lines)
    return found
