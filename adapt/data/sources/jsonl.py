"""JSON lines: an object per line. A malformed line is yielded as a BadRecord with its file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from adapt.components import sources
from adapt.data import decoding, files
from adapt.data.documents import BadRecord, Document
from adapt.data.records import Fields, to_document
from adapt.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson")


@dataclass(frozen=True, kw_only=True)
class JsonlConfig:
    path: str
    """File, folder (its .jsonl, .jsonl.gz and .ndjson files at any depth) or glob pattern."""
    fields: Fields = field(default_factory=Fields)
    """Names of the fields, where they are not the usual ones."""
    licence: str | None = None
    """Printed in the manifest and the model card."""
    encoding: str = "utf-8"
    """How bytes are read: `utf-8`, a name such as `cp1252` or `utf-16`, or `auto`: UTF-8 or what the bytes look like, line
    by line in JSONL; counted in the manifest."""

    def __post_init__(self) -> None:
        decoding.check(self.encoding)


class JsonlSource:
    def __init__(self, where: str, found: list[Path], fields: Fields, licence: str | None, encoding: str = "utf-8"):
        self.where, self.files, self.fields, self.licence = where, found, fields, licence
        self.encoding = encoding
        self.label = Path(where).name.split(".")[0] or "jsonl"

    def fingerprint(self) -> str:
        return files.fingerprint(self.files, "jsonl", self.fields, *decoding.option(self.encoding))

    def documents(self) -> Iterator[Document | BadRecord]:
        for file in self.files:
            for number, line, encoding in decoding.lines(file, self.encoding):
                if isinstance(line, str) and not line.strip():
                    continue
                document = self._document(line, f"{file}:{number}", file.name, encoding)
                del line  # it may be huge, and so may be the document
                yield document
                del document

    def _document(self, line: str | UserError, where: str, part: str, encoding: str) -> Document | BadRecord:
        if isinstance(line, UserError):
            return BadRecord(where, str(line).removeprefix(f"{where}: "))
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            return BadRecord(where, f"not a JSON object: {error}")
        document = to_document(record, self.fields, where, part)
        if isinstance(document, Document) and self.encoding != decoding.UTF8:
            document.meta["decoded_as"] = encoding
        return document


@sources.register("jsonl")
def jsonl(config: JsonlConfig) -> JsonlSource:
    return JsonlSource(config.path, files.find(config.path, SUFFIXES), config.fields, config.licence, config.encoding)
