"""JSON lines: an object per line. A malformed line is yielded as a BadRecord with its file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from adapt.components import sources
from adapt.data import files
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


class JsonlSource:
    def __init__(self, where: str, found: list[Path], fields: Fields, licence: str | None):
        self.where, self.files, self.fields, self.licence = where, found, fields, licence
        self.label = Path(where).name.split(".")[0] or "jsonl"

    def fingerprint(self) -> str:
        return files.fingerprint(self.files, "jsonl", self.fields)

    def documents(self) -> Iterator[Document | BadRecord]:
        for file in self.files:
            for number, offset, line in files.lines(file):
                if line.strip():
                    yield self._document(line, f"{file}:{number}", offset, file.name)

    def _document(self, line: bytes, where: str, offset: int, part: str) -> Document | BadRecord:
        try:
            record = json.loads(files.decode(line, where, offset))
        except (UserError, ValueError, RecursionError) as error:
            what = str(error).removeprefix(f"{where}: ")
            return BadRecord(where, what if isinstance(error, UserError) else f"not a JSON object: {what}")
        return to_document(record, self.fields, where, part)


@sources.register("jsonl")
def jsonl(config: JsonlConfig) -> JsonlSource:
    return JsonlSource(config.path, files.find(config.path, SUFFIXES), config.fields, config.licence)
