"""`adapt tokenizer extend`: count words, learn tokens, prove what was promised, write the folder, print the gain."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapt.config.decode import encode
from adapt.errors import Problem, UserError
from adapt.pretrained.bases import parse
from adapt.tokenization import folder as folders
from adapt.tokenization.base import Base
from adapt.tokenization.kinds import read_base, wrong_method
from adapt.tokenization.metrics import Change, Fit, change, fit
from adapt.tokenization.recipe import TokenizerRecipe
from adapt.tokenization.sweep import Point, plot, sweep
from adapt.tokenization.texts import open_texts

PLOT = "gain.png"


@dataclass(frozen=True)
class Extended:
    out: Path
    num_tokens: int
    """New ones."""
    num_merges: int
    proofs: dict[str, list[str]]
    fits: list[tuple[str, str, Fit]]
    """(tokenizer, text, fit)"""
    changes: dict[str, Change]
    """Of each held-out text."""
    points: list[Point]
    """The sweep; empty where none was asked for."""
    warnings: list[str]
    seconds: dict[str, float]


def extend(recipe: TokenizerRecipe, tell: Callable[[str], None] = lambda what: None) -> Extended:
    """`tell` is given what is being done. Raises UserError with all problems that are seen before a text is read, or when a proof fails."""
    base, old, method, opened = _open(recipe)
    texts = opened.held_out(tell)
    clock = [time.perf_counter()]
    words, num_bytes = opened.count(tell)
    clock.append(time.perf_counter())
    tell(f"learning {recipe.tokens:,d} tokens from {len(words):,d} different words in {num_bytes:,d} bytes")
    learned = method(old, words, recipe.tokens)
    clock.append(time.perf_counter())
    if recipe.tokens and not learned.tokens:
        what = f"no pair of symbols in the {num_bytes:,d} bytes of text may be merged; give more text, or text of another language"
        raise UserError(Problem("train", what))
    warnings = opened.warnings()
    if len(learned.tokens) < recipe.tokens:
        warnings.append(
            f"only {len(learned.tokens):,d} of {recipe.tokens:,d} tokens were found: {num_bytes:,d} bytes of text have no "
            "other pair that occurs often enough; give more text"
        )
    new = old.grown(learned)
    samples = opened.samples(texts)
    tell("writing, proving and measuring")
    out = recipe.out
    temporary = out.with_name(f".{out.name}.new")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        folders.write(base, new, temporary)
        new.write(temporary)
        proofs = old.prove(new, base, temporary, samples, method)
        if any(proofs.values()):
            raise UserError(
                [Problem(f"not so: {claim}", "; ".join(found[:3])) for claim, found in proofs.items() if found]
            )
        warnings += old.warnings(new, samples)
        fits = [
            (name, label, fit(bpe.tokenizer(), found))
            for label, found in texts.items()
            for name, bpe in (("base", old), (recipe.name, new))
        ]
        changes = {name: change(old.tokenizer(), new.tokenizer(), old.next_id, found) for name, found in texts.items()}
        lost = len(new.unreachable(learned.tokens))
        record = _record(recipe, old, new, num_bytes, proofs, fits, folders.sha256(temporary)) | {"unreachable": lost}
        record["changes"] = {name: asdict(one) for name, one in changes.items()}
        points = sweep(old, learned, recipe.sweep, texts) if recipe.sweep else []
        if points:
            (temporary / PLOT).write_bytes(plot(points))
            record["sweep"] = [{"new_tokens": p.num_tokens, "text": p.text, **p.fit.facts()} for p in points]
        (temporary / folders.MARKER).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
        folders.swap(temporary, out)
    except OSError as error:
        raise UserError(Problem("dir", f"{error.filename or out}: cannot be written: {error.strerror}")) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    seconds = {"reading, cleaning and counting words": clock[1] - clock[0], "learning merges": clock[2] - clock[1]}
    if lost:
        warnings.append(
            f"{lost:,d} of the {len(learned.tokens):,d} new tokens are reached by no text: rows of the embedding that never "
            "train (the method promises nothing else)"
        )
    return Extended(out, len(learned.tokens), len(learned.merges), proofs, fits, changes, points, warnings, seconds)


def _open(recipe: TokenizerRecipe):
    """(folder of the base, base, method, texts); all problems at once."""
    from adapt.pretrained.load import tokenizer_folder

    problems: list[Problem] = folders.check_out(recipe.out, "dir")
    base = old = None
    try:
        base = tokenizer_folder(parse(recipe.base, "base"), recipe.revision)
        old = read_base(base)
        problems += filter(None, [wrong_method(old, recipe.method)])
    except UserError as error:
        problems += [
            Problem("base" if p.where.startswith(("model.", "tokenizer.")) else p.where, p.what) for p in error.problems
        ]
    opened, wrong = open_texts(recipe, old)
    problems += wrong
    if problems:
        raise UserError(problems)
    return base, old, recipe.method.build(), opened


def _record(recipe, old: Base, new: Base, num_bytes: int, proofs, fits, sha256: str) -> dict[str, Any]:
    return {
        "recipe": encode(recipe),
        "tokenizer_sha256": sha256,
        "old_tokens": len(old.ids),
        "new_tokens": new.next_id - old.next_id,
        "first_new_id": old.next_id,
        "new_merges": len(new.merges) - len(old.merges),
        "bytes_read": num_bytes,
        "proved": list(proofs),
        "fit": [{"tokenizer": name, "text": label, **one.facts()} for name, label, one in fits],
    }
