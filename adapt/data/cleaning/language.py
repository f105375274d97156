"""Texts in other languages than those wanted, whole or paragraph by paragraph (py3langid; Lui & Baldwin 2012)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Literal

from adapt.components import cleaners
from adapt.data.cleaning.base import whole_text
from adapt.data.documents import Document
from adapt.errors import UserError

SAMPLE = 5000
"""Characters of a document that are looked at: more do not change the verdict."""


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    keep: tuple[str, ...]
    """ISO 639-1 codes of the languages wanted."""
    among: tuple[str, ...] | None = None
    """Languages that are considered at all; null: all that py3langid knows. Fewer are told apart better."""
    unit: Literal["document", "paragraph"] = "document"
    """`paragraph`: take paragraphs in other languages out of plain-text documents (half-translated manuals), and drop
    documents that have none left."""
    min_probability: float = 0.5
    """A language that is less probable than this is not believed."""
    min_letters: int = 60
    """Texts with fewer letters are undecided."""
    undecided: Literal["keep", "drop"] = "keep"
    """What happens to short and to doubtful texts."""

    def __post_init__(self) -> None:
        if not self.keep:
            raise ValueError("keep is empty: no document would be left")
        if self.among is not None and not set(self.keep) <= set(self.among):
            raise ValueError("among must contain every language of keep")
        if not 0 <= self.min_probability <= 1:
            raise ValueError(f"min_probability={self.min_probability} must lie between 0 and 1")


class Language:
    sequential = False

    def __init__(self, config: LanguageConfig):
        self.config = config
        known = list(map(str, _identifier(None).labels))  # loads the model: 1 s, so not when a recipe is read
        for name in ("keep", "among"):
            unknown = [code for code in getattr(config, name) or () if code not in known]
            if unknown:
                raise UserError(
                    f"language: {name} has {unknown[0]!r}, which is not known; known: {', '.join(sorted(known))}"
                )

    def __call__(self, document: Document) -> Document | str:
        c = self.config
        if c.unit == "document" or document.text is None:
            found = self.of(whole_text(document)[:SAMPLE])
            if found in c.keep or (found is None and c.undecided == "keep"):
                return document
            return f"language {found or 'undecided'}"
        paragraphs = document.text.split("\n\n")
        verdicts = [self.of(p[:SAMPLE]) for p in paragraphs]
        kept = [
            p for p, v in zip(paragraphs, verdicts, strict=True) if v in c.keep or (v is None and c.undecided == "keep")
        ]
        wanted = any(v in c.keep for v in verdicts)
        foreign = any(v is not None and v not in c.keep for v in verdicts)
        if not kept or (foreign and not wanted):
            return "no paragraph in the languages wanted"
        return (
            dataclasses.replace(document, text="\n\n".join(kept))
            if foreign or len(kept) < len(paragraphs)
            else document
        )

    def of(self, text: str) -> str | None:
        """The language's code; None: undecided."""
        if sum(map(str.isalpha, text)) < self.config.min_letters:
            return None
        code, probability = _identifier(self.config.among).classify(text)
        return str(code) if probability >= self.config.min_probability else None


@cache
def _identifier(among: tuple[str, ...] | None):
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if among is not None:
        identifier.set_languages(list(among))
    return identifier


@cleaners.register("language")
def language(config: LanguageConfig) -> Language:
    return Language(config)
