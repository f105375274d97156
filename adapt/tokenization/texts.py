"""The texts that a tokenizer's recipe names: opened, counted, and a part of them for the proofs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from adapt.data.cache import cache_folder
from adapt.data.documents import BadRecord, Source
from adapt.errors import Problem, UserError
from adapt.tokenization.base import Base
from adapt.tokenization.recipe import BuiltTokenizer, Texts
from adapt.tokenization.words import WordWork, count_words, read_texts

PROOF_BYTES = 2**20
"""About so much text of each held-out set the proofs run over."""


@dataclass
class Opened:
    recipe: BuiltTokenizer
    sections: dict[str, list[tuple[str, Texts, Source, WordWork]]]
    """Of `train` and of `eval`: label, entry, source, and what is done to its documents."""
    bad: list[BadRecord] = field(default_factory=list)
    """Records that could not be read so far."""

    def held_out(self, tell: Callable[[str], None]) -> dict[str, list[str]]:
        """Label -> texts of `eval`. Raises UserError where one has none."""
        texts = {}
        for label, t, source, work in self.sections["eval"]:
            tell(f"reading held-out text: {label}")
            texts[label] = list(read_texts(source, work, t.max_bytes, self.bad))
        if empty := [label for label, found in texts.items() if not any(text.split() for text in found)]:
            raise UserError([Problem("eval", f"{label}: there is no text in it after cleaning") for label in empty])
        return texts

    def count(self, tell: Callable[[str], None]) -> tuple[Counter[str], int]:
        """(word -> occurrences, UTF-8 bytes) of `train`."""
        words: Counter[str] = Counter()
        num_bytes = 0
        for label, t, source, work in self.sections["train"]:
            tell(f"counting words: {label}")
            counts, size = count_words(source, work, self.recipe.workers, t.max_bytes, self.bad)
            words.update(counts)
            num_bytes += size
        return words, num_bytes

    def samples(self, texts: dict[str, list[str]]) -> list[str]:
        """What the proofs run over: of each held-out text the beginning; where there is none, of the first of `train`."""
        found = [text for one in texts.values() for text in _beginning(one)]
        if not found:
            _, _, source, work = self.sections["train"][0]
            found = list(read_texts(source, work, PROOF_BYTES))
        return found

    def warnings(self) -> list[str]:
        if not self.bad:
            return []
        first = self.bad[0]
        return [f"{len(self.bad):,d} records could not be read; the first is {first.where}: {first.what}"]


def open_texts(recipe: BuiltTokenizer, tokenizer: Base | None) -> tuple[Opened, list[Problem]]:
    """The sources of a recipe, for a tokenizer (null: there is something wrong with it); nothing is read yet. All
    problems at once."""
    problems: list[Problem] = []
    opened = Opened(recipe, {"train": [], "eval": []})
    for section, entries in (("train", recipe.train), ("eval", recipe.eval)):
        for i, t in enumerate(entries):
            try:
                source = t.source.build()
                if hasattr(source, "use_tokenizer"):
                    raise UserError("its texts are made for a tokenizer, and there is none yet; give another source")
                if hasattr(source, "use_cache"):
                    source.use_cache(cache_folder(recipe.cache))
                source.fingerprint()
                cleaners = (*getattr(source, "clean", ()), *t.clean)
                work = tokenizer.work(cleaners) if tokenizer else WordWork("", (), cleaners)
                opened.sections[section].append((t.name or source.label, t, source, work))
            except UserError as error:
                problems += [Problem(f"{section}[{i}].source", str(p)) for p in error.problems]
    labels = [label for label, *_ in opened.sections["eval"]]
    problems += [
        Problem("eval", f"two entries are called {label!r}; give each a `name` of its own")
        for label in sorted({x for x in labels if labels.count(x) > 1})
    ]
    return opened, problems


def _beginning(texts: list[str]) -> Iterator[str]:
    size = 0
    for text in texts:
        if size >= PROOF_BYTES:
            return
        size += len(text.encode())
        yield text
