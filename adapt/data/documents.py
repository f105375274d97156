"""What a source yields, and what a source is. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document in one of four forms: `text`; `messages`; `prompt` and `response`; `chosen` and `rejected` (with a
    `prompt`, or with the prompt inside both conversations)."""

    id: str
    """Where it comes from, unique in its source (`file:line`, `package:module.name`)."""
    text: str | None = None
    messages: Messages | None = None
    prompt: str | Messages | None = None
    response: str | None = None
    chosen: str | Messages | None = None
    rejected: str | Messages | None = None
    plain: bool = False
    """Prompt and response are text to go on with, even where the tokenizer has a chat template."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Facts about it. `part` (a file, a package) and `licence` are counted in the manifest."""

    def strings(self) -> Iterator[str]:
        """Every piece of its text, in order; what deduplication compares and words are counted in."""
        for value in (self.text, self.messages, self.prompt, self.response, self.chosen, self.rejected):
            if isinstance(value, str):
                yield value
            elif value is not None:
                yield from (m["content"] for m in value)


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that could not be read. Preparation lists it, and fails when there are too many."""

    where: str
    what: str


class Source(Protocol):
    label: str
    """Name in logs and reports where the recipe gives none."""
    where: str
    """What the user would look at when it yields nothing: a path, a Hub id."""
    licence: str | None
    # A source that others serve says `remote = True`; one with a method `use_cache(folder)` is told, before it is read,
    # where it may keep what it learned; one with `use_tokenizer(tokenizer)` makes its texts for a tokenizer.
    # Where asking for the fingerprint would download much, a method `check()` does what validation can do without, and
    # `fetch()` brings what is downloaded as a whole into the cache.
    # `clean` (a tuple of CleanerChoice): cleaning steps of its own, run before the dataset's.

    def fingerprint(self) -> str:
        """Changes when the documents change; far cheaper than reading them. Raises UserError for what is missing."""
        ...

    def documents(self) -> Iterator[Document | BadRecord]:
        """All documents, always in the same order."""
        ...
