"""Sources that suites name for themselves, apart from the recipe's held-out data."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from adapt.components import SourceChoice
from adapt.data.documents import BadRecord, Document
from adapt.errors import Problem, UserError


def open_source(choice: SourceChoice, tokenizer: Any) -> Any:
    source = choice.build()
    if hasattr(source, "use_tokenizer"):
        source.use_tokenizer(tokenizer)
    return source


def source_problems(choice: SourceChoice) -> Iterator[Problem]:
    """What is wrong with a source; nothing is read."""
    try:
        choice.build()
    except UserError as error:
        yield from error.problems


def label_of(choice: SourceChoice, own: str | None) -> str:
    """As metrics name it: the suite's own label, or the source's (of one that cannot be opened, its name)."""
    try:
        return own or choice.build().label
    except UserError:  # `problems` says so
        return choice.name


def answered(source: Any, limit: int | None, suite: str) -> list[Document]:
    """The first `limit` documents (null: all) with a prompt and a response. Raises UserError where there are none."""
    documents = (d for d in source.documents() if not isinstance(d, BadRecord) and d.response and d.prompt)
    found = list(islice(documents, limit))
    if not found:
        raise UserError(
            f"suite {suite}: {source.where} has no record with a prompt and a response; name its fields, e.g. "
            f"{{name: jsonl, path: FILE, fields: {{prompt: question, response: answer}}}}"
        )
    return found
