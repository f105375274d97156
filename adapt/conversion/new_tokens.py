"""What an extended tokenizer has that the base's own has not, and what the old model called it; and what both
conversions of the vocabulary ask of a recipe."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from adapt.config.schema import Recipe, Tokenizer
from adapt.errors import Problem, UserError

WHERE = "tokenizer.path"


@dataclass(frozen=True)
class NewTokens:
    ids: tuple[int, ...]
    """Ascending."""
    pieces: tuple[tuple[int, ...], ...]
    """Old ids of each one's text, in reading order; () for special tokens, whose text is a name only."""
    size: int
    """Rows the extended tokenizer needs: its largest id, plus 1."""


def rows_problems(config: Any, recipe: Recipe, why: str) -> Iterator[Problem]:
    """Of `pad_to_multiple`, and of a teacher that is the base itself: `why` it cannot be."""
    if recipe.teacher is not None and recipe.teacher.base == "self":
        yield Problem("teacher.base", f"self is the base before conversions, and {why}, or do without one")
    if config.pad_to_multiple < 1:
        yield Problem("", f"pad_to_multiple={config.pad_to_multiple} must be 1 or more; 64 and 128 are usual")


def padded_rows(rows: int, config: Any) -> int:
    """Up to a multiple of `pad_to_multiple` (below 1 is refused by the config's rules)."""
    multiple = max(1, config.pad_to_multiple)
    return -(-rows // multiple) * multiple


def base_tokenizer(recipe: Recipe, *, offline: bool) -> Any:
    """The base's own, whatever the recipe's is."""
    from adapt.pretrained import load_tokenizer

    return load_tokenizer(dataclasses.replace(recipe, tokenizer=Tokenizer()), offline=offline)


def new_tokens(base: Any, extended: Any, rows: int) -> NewTokens:
    """Of two transformers tokenizers and the rows there are; a token of the base that never had a row is new, too.
    Raises UserError where the second tokenizer is no extension of the first."""
    old, vocabulary = base.get_vocab(), extended.get_vocab()
    if problems := _problems(old, vocabulary):
        raise UserError(problems)
    added = extended.added_tokens_decoder
    names = {i: token for token, i in vocabulary.items() if token not in old or i >= rows}
    ids = sorted(names)
    pieces = (_pieces(base, names[i], added.get(i)) for i in ids)
    return NewTokens(
        tuple(ids), tuple(p if all(i < rows for i in p) else () for p in pieces), max(vocabulary.values()) + 1
    )


def _problems(old: dict[str, int], new: dict[str, int]) -> list[Problem]:
    found = []
    if lost := sorted(old.keys() - new.keys(), key=old.__getitem__):
        found.append(
            Problem(
                WHERE,
                f"lacks {len(lost):,} of the base's {len(old):,} tokens, {lost[0]!r} (id {old[lost[0]]}) first: it is "
                "another tokenizer, and no extension of the base's; extend the base's own. Where it is the base's, pruned, "
                "the conversion is `pruned_vocabulary`",
            )
        )
    if moved := sorted((t for t in old if t in new and new[t] != old[t]), key=old.__getitem__):
        first = moved[0]
        found.append(
            Problem(
                WHERE,
                f"gives {len(moved):,} of the base's tokens other ids: {first!r} is {old[first]} in the base and "
                f"{new[first]} here, so the model would read {first!r} as another token. An extension keeps all old "
                "ids; where only special tokens moved, they must also stand in the vocabulary of tokenizer.json, "
                "under their old ids",
            )
        )
    if twice := sorted(i for i, n in Counter(new.values()).items() if n > 1):
        names = ", ".join(repr(t) for t in sorted(t for t, i in new.items() if i == twice[0]))
        found.append(Problem(WHERE, f"has {len(twice):,} ids with two tokens: {twice[0]} is {names}; build it again"))
    if not found and len(new) == len(old):
        found.append(
            Problem(
                WHERE,
                f"has the base's {len(old):,} tokens and no other, so there is nothing to extend; leave this "
                "conversion out, or give the extended tokenizer",
            )
        )
    return found


def _pieces(base: Any, piece: str, added: Any) -> tuple[int, ...]:
    """The old ids of a new token. A piece of the vocabulary goes through the old model alone (the whole pipeline would
    take its letters for text, and put a prefix before them); an added token is text as it stands."""
    raw = base.backend_tokenizer
    if added is not None:
        ids = () if added.special else tuple(raw.encode(added.content, add_special_tokens=False).ids)
    else:
        ids = tuple(token.id for token in raw.model.tokenize(piece))
    unknown = raw.token_to_id(raw.model.unk_token) if getattr(raw.model, "unk_token", None) else None
    return () if unknown in ids else ids
