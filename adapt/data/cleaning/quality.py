"""Whether a text reads like running text: Gopher's rules (Rae et al. 2021, tables A1 and A2) as Cabrita uses them.

Thresholds are Cabrita's where it has its own (at least 2 stop words, at most 90 % bullet lines), and Gopher's otherwise. The
reason for dropping a document is the name of the rule it breaks first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from adapt.components import cleaners
from adapt.data.cleaning.base import whole_text
from adapt.data.documents import Document

STOP_WORDS = {
    "de": "der die das und in zu den mit von ist nicht ein eine auf sich",
    "en": "the be to of and that have with is in for on it as are",
    "es": "el la de que y en un ser se no los con para una por",
    "fr": "le la de et les des en un une est que pour dans qui sur",
    "it": "il di che e la in un per è non con una del si da",
    "pt": "o a de que e do da em um para é com não uma os",
}
"""A few of the most frequent words of each language."""
BULLETS = ("-", "*", "•", "·", "–", "▪", "◦", "●", "‣", "→")
ELLIPSES = ("...", "…")
WORDS = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    min_words: int | None = 50
    """Fewest words (pieces between white space). Every rule: null turns it off."""
    max_words: int | None = 100_000
    """Most words."""
    min_mean_word_length: float | None = 3.0
    """Least mean number of characters of a word."""
    max_mean_word_length: float | None = 10.0
    """Largest mean number of characters of a word."""
    max_symbol_ratio: float | None = 0.1
    """Most hash signs and ellipses per word."""
    max_bullet_lines: float | None = 0.9
    """Largest share of lines that begin with a bullet."""
    max_ellipsis_lines: float | None = 0.3
    """Largest share of lines that end in an ellipsis."""
    min_words_with_letter: float | None = 0.8
    """Least share of words with a letter in them."""
    min_stop_words: int | None = 2
    """Fewest occurrences of the language's stop words; looked at if `stop_words` names a language."""
    stop_words: str | tuple[str, ...] | None = None
    """Language whose stop words are counted (de, en, es, fr, it, pt), or a list of words; null: none."""
    max_duplicate_lines: float | None = 0.3
    """Largest share of lines that repeat an earlier line of the document."""
    max_duplicate_paragraphs: float | None = 0.3
    """Largest share of paragraphs that repeat an earlier one."""
    max_duplicate_line_characters: float | None = 0.2
    """Largest share of characters in repeated lines."""
    max_duplicate_paragraph_characters: float | None = 0.2
    """Largest share of characters in repeated paragraphs."""
    max_top_ngrams: tuple[float, ...] | None = (0.2, 0.18, 0.16)
    """Largest share of characters in the most frequent n-gram of 2, 3, 4, ... words."""
    max_duplicate_ngrams: tuple[float, ...] | None = (0.15, 0.14, 0.13, 0.12, 0.11, 0.1)
    """Largest share of characters in repeated n-grams of 5, 6, 7, ... words."""

    def __post_init__(self) -> None:
        if isinstance(self.stop_words, str) and self.stop_words not in STOP_WORDS:
            raise ValueError(
                f"stop_words={self.stop_words!r}: known are {', '.join(STOP_WORDS)}; or give a list of words"
            )


class Quality:
    sequential = False

    def __init__(self, config: QualityConfig):
        self.config = config
        chosen = STOP_WORDS[config.stop_words].split() if isinstance(config.stop_words, str) else config.stop_words
        self.stop_words = frozenset(chosen or ())

    def __call__(self, document: Document) -> Document | str:
        return self.broken_rule(whole_text(document)) or document

    def broken_rule(self, text: str) -> str | None:
        """The name of the first rule that the text breaks; None: it keeps all."""
        return next((rule for rule, holds in self._rules(text) if not holds), None)

    def _rules(self, text: str) -> Iterator[tuple[str, bool]]:
        """(rule, whether it holds), cheap ones first; one at a time, so that what is dropped early costs little."""
        c = self.config
        words = text.split()
        count = max(1, len(words))
        yield "min_words", c.min_words is None or len(words) >= c.min_words
        yield "max_words", c.max_words is None or len(words) <= c.max_words
        mean = sum(map(len, words)) / count
        yield "min_mean_word_length", c.min_mean_word_length is None or mean >= c.min_mean_word_length
        yield "max_mean_word_length", c.max_mean_word_length is None or mean <= c.max_mean_word_length
        symbols = text.count("#") + sum(text.count(e) for e in ELLIPSES)
        yield "max_symbol_ratio", c.max_symbol_ratio is None or symbols / count <= c.max_symbol_ratio
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        yield "max_bullet_lines", _share(lines, lambda x: x.startswith(BULLETS), c.max_bullet_lines)
        yield "max_ellipsis_lines", _share(lines, lambda x: x.endswith(ELLIPSES), c.max_ellipsis_lines)
        with_letter = sum(any(map(str.isalpha, w)) for w in words)
        yield "min_words_with_letter", c.min_words_with_letter is None or with_letter >= c.min_words_with_letter * count
        plain = [w.casefold() for w in WORDS.findall(text)]
        if self.stop_words and c.min_stop_words is not None:
            yield "min_stop_words", sum(w in self.stop_words for w in plain) >= c.min_stop_words
        yield from _repeated(lines, "line", c.max_duplicate_lines, c.max_duplicate_line_characters)
        paragraphs = [p.strip() for p in text.split("\n\n") if p.strip()]
        yield from _repeated(paragraphs, "paragraph", c.max_duplicate_paragraphs, c.max_duplicate_paragraph_characters)
        for n, limit in enumerate(c.max_top_ngrams or (), start=2):
            yield "max_top_ngrams", top_ngram(plain, n) <= limit
        for n, limit in enumerate(c.max_duplicate_ngrams or (), start=5):
            yield "max_duplicate_ngrams", duplicate_ngrams(plain, n) <= limit


def _share(lines: list[str], has: Callable[[str], bool], limit: float | None) -> bool:
    return limit is None or sum(map(has, lines)) <= limit * len(lines)


def _repeated(
    pieces: list[str], what: str, limit: float | None, of_characters: float | None
) -> Iterator[tuple[str, bool]]:
    seen: set[str] = set()
    again = [p for p in pieces if p in seen or seen.add(p)]
    yield f"max_duplicate_{what}s", limit is None or len(again) <= limit * len(pieces)
    size = sum(map(len, pieces))
    yield f"max_duplicate_{what}_characters", of_characters is None or sum(map(len, again)) <= of_characters * size


def top_ngram(words: list[str], n: int) -> float:
    """Share of the characters of `words` that lie in the most frequent n-gram, if it occurs more than once."""
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    if not counts:
        return 0.0
    ngram, times = max(counts.items(), key=lambda item: (item[1], sum(map(len, item[0]))))
    return times * sum(map(len, ngram)) / max(1, sum(map(len, words))) if times > 1 else 0.0


def duplicate_ngrams(words: list[str], n: int) -> float:
    """Share of the characters of `words` that lie in n-grams seen before; none is counted twice."""
    seen: set[tuple[str, ...]] = set()
    characters = 0
    end = 0
    for i, ngram in enumerate(zip(*(words[i:] for i in range(n)), strict=False)):
        if ngram in seen:
            characters += sum(map(len, words[max(i, end) : i + n]))
            end = i + n
        seen.add(ngram)
    return characters / max(1, sum(map(len, words)))


@cleaners.register("quality")
def quality(config: QualityConfig) -> Quality:
    return Quality(config)
