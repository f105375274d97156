"""`adapt tokenizer prune`: count tokens, drop those that a corpus does not use, prove what was promised, write the folder."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapt.config.decode import encode
from adapt.errors import Problem, UserError
from adapt.pretrained.bases import parse
from adapt.tokenization import folder as folders
from adapt.tokenization.byte_bpe import FILE, ByteBpe
from adapt.tokenization.metrics import Fit, fit
from adapt.tokenization.prune_proofs import compare, prove
from adapt.tokenization.pruning import Closure, choose, find, occurrences, pruned
from adapt.tokenization.recipe import PruneRecipe
from adapt.tokenization.texts import Opened, open_texts

OLD_IDS = "added_tokens.json"
"""A second copy of ids that tokenizer.json has."""


@dataclass(frozen=True)
class Loss:
    """What pruning did to a held-out text."""

    lines: int
    """Lines with something in them."""
    changed: int
    """Of these, lines that have other tokens than before."""
    fewer: int
    """Lines that have fewer: BPE takes the first merge that can run, and not the shortest way."""


@dataclass(frozen=True)
class Pruned:
    out: Path
    old_tokens: int
    num_tokens: int
    """What is left."""
    unused: int
    """Of these, tokens that the corpus does not have: kept always, asked for, or needed by others."""
    proofs: dict[str, list[str]]
    fits: list[tuple[str, str, Fit]]
    """(tokenizer, text, fit)"""
    losses: dict[str, Loss]
    """Of each held-out text."""
    warnings: list[str]
    seconds: dict[str, float]


def prune(recipe: PruneRecipe, tell: Callable[[str], None] = lambda what: None) -> Pruned:
    """`tell` is given what is being done. Raises UserError with all problems that are seen before a text is read, when
    there is nothing to prune, or when a proof fails."""
    base, old, closure, opened = _open(recipe)
    texts = opened.held_out(tell)
    start = time.perf_counter()
    words, num_bytes = opened.count(tell)
    counted = time.perf_counter()
    tell(f"choosing tokens by {len(words):,d} different words in {num_bytes:,d} bytes")
    counts = occurrences(old, words)
    kept = choose(closure, counts, recipe.min_count, recipe.tokens)
    chosen = time.perf_counter()
    if len(kept) == len(old.ids):
        how = (
            f"{recipe.min_count:,d} times or more, or is needed by one that does"
            if recipe.min_count > 1
            else "in the texts"
        )
        what = f"there is nothing to prune: each of the {len(kept):,d} tokens occurs {how}; raise it, or set `tokens`"
        raise UserError(Problem("min_count", what))
    new = pruned(old, kept)
    tell("writing, proving and measuring")
    out = recipe.out
    temporary = out.with_name(f".{out.name}.new")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        write(base, old, new, temporary)
        proofs = prove(old, new, base, temporary, opened.samples(texts), list(words), strict=recipe.strict)
        if any(proofs.values()):
            raise UserError(
                [Problem(f"not so: {claim}", "; ".join(found[:3])) for claim, found in proofs.items() if found]
            )
        fits = [
            (name, label, fit(bpe.tokenizer(), found))
            for label, found in texts.items()
            for name, bpe in (("base", old), (recipe.name, new))
        ]
        losses = {label: _loss(old, new, found) for label, found in texts.items()}
        record = {
            "recipe": encode(recipe),
            "tokenizer_sha256": folders.sha256(temporary),
            "old_tokens": len(old.ids),
            "tokens": len(new.ids),
            "merges": len(new.merges),
            "bytes_read": num_bytes,
            "proved": list(proofs),
            "fit": [{"tokenizer": name, "text": label, **one.facts()} for name, label, one in fits],
            "losses": {label: asdict(one) for label, one in losses.items()},
        }
        (temporary / folders.MARKER).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
        folders.swap(temporary, out)
    except OSError as error:
        raise UserError(Problem("dir", f"{error.filename or out}: cannot be written: {error.strerror}")) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    warnings = opened.warnings()
    if recipe.tokens is not None and all(t in kept for t, n in counts.items() if n >= recipe.min_count):
        warnings.append(f"tokens={recipe.tokens:,d} sets no limit: only {len(kept):,d} are used, or needed by these")
    seconds = {"reading, cleaning and counting words": counted - start, "choosing tokens": chosen - counted}
    unused = sum(1 for token in kept if not counts[token])
    return Pruned(out, len(old.ids), len(new.ids), unused, proofs, fits, losses, warnings, seconds)


def _open(recipe: PruneRecipe) -> tuple[Path, ByteBpe, Closure, Opened]:
    """(folder of the base, base, what is kept of it, texts); all problems at once."""
    from adapt.pretrained.load import tokenizer_folder

    problems: list[Problem] = folders.check_out(recipe.out, "dir")
    base = old = closure = None
    try:
        base = tokenizer_folder(parse(recipe.base, "base"), recipe.revision)
        _refuse_kind(base)
        old = ByteBpe.read(base)
    except UserError as error:
        problems += [
            Problem("base" if p.where.startswith(("model.", "tokenizer.")) else p.where, p.what) for p in error.problems
        ]
    if old is not None:
        try:
            closure = Closure(old, find(old, recipe.keep), recipe.strict)
            if recipe.tokens is not None:
                if recipe.tokens >= len(old.ids):
                    what = f"{recipe.tokens:,d} are no fewer than the {len(old.ids):,d} there are; set fewer, or null"
                    raise UserError(Problem("tokens", what))
                choose(closure, {}, recipe.min_count, recipe.tokens)
        except UserError as error:
            problems += error.problems
    opened, wrong = open_texts(recipe, old)
    problems += wrong
    if problems:
        raise UserError(problems)
    return base, old, closure, opened  # type: ignore[return-value]


def _refuse_kind(base: Path) -> None:
    """Pruning follows merges between bytes; other kinds are named, and what they would need."""
    file = base / FILE
    if not file.is_file():
        kind = "a SentencePiece model" if list(base.glob("*.model")) else "no tokenizer.json"
        raise UserError(
            Problem("base", f"{base} has {kind}; only byte-level BPE tokenizers (GPT-2, Llama-3) are pruned")
        )
    try:
        model = json.loads(file.read_text("utf-8"))["model"]
        kind = model.get("type") or "BPE"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # the reader says what is wrong with the file
    if kind != "BPE" or model.get("byte_fallback"):
        name = "SentencePiece BPE (byte_fallback)" if kind == "BPE" else kind
        what = f"{file}: its model is {name}, whose pieces have scores or affixes and no merges of bytes"
        raise UserError(Problem("base", f"{what}; only byte-level BPE tokenizers (GPT-2, Llama-3, SmolLM2) are pruned"))


def write(base: Path, old: ByteBpe, new: ByteBpe, folder: Path) -> None:
    """The pruned tokenizer into `folder` (new): the base's files, with the new ids in those beside tokenizer.json, too."""
    folders.write(base, new, folder)
    (folder / OLD_IDS).unlink(missing_ok=True)
    file = folder / folders.CONFIG
    fields: dict[str, Any] = json.loads(file.read_text("utf-8"))
    if decoder := fields.get("added_tokens_decoder"):
        fields["added_tokens_decoder"] = {
            str(new.ids[token["content"]]): token for token in decoder.values() if token["content"] in new.ids
        }
    names: Mapping[int, str] = {i: token for token, i in old.ids.items()}
    for key, value in fields.items():
        if key.endswith("_token_id") and isinstance(value, int):
            fields[key] = new.ids.get(names.get(value, ""))
    file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _loss(old: ByteBpe, new: ByteBpe, texts: Sequence[str]) -> Loss:
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    compared = compare(old, new, lines)
    return Loss(len(lines), compared.other, len(compared.fewer))
