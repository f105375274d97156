"""A local file or folder of any readable kind; the file names say how to read it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from adapt.components import sources
from adapt.data import decoding, files
from adapt.data.documents import BadRecord, Document
from adapt.data.records import Fields
from adapt.data.sources import jsonl, parquet, text
from adapt.errors import UserError

SUFFIXES = text.SUFFIXES + jsonl.SUFFIXES + parquet.SUFFIXES


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    path: str
    """File, folder or glob pattern of .txt, .md, .jsonl, .jsonl.gz, .ndjson and .parquet files."""
    fields: Fields = field(default_factory=Fields)
    """Names of the fields in JSONL and Parquet files, where they are not the usual ones."""
    separator: str | None = None
    """Text between documents within a text file; null: a file is one document."""
    licence: str | None = None
    """Printed in the manifest and the model card."""
    encoding: str = "utf-8"
    """How bytes are read: `utf-8`, a name such as `cp1252` or `utf-16`, or `auto`: UTF-8 or what the bytes look like, line
    by line in JSONL; counted in the manifest."""

    def __post_init__(self) -> None:
        decoding.check(self.encoding)
        if self.separator == "":
            raise ValueError("separator='' parts nothing; give the text between documents, or null")


class PathSource:
    def __init__(self, config: PathConfig):
        self.where, self.licence = config.path, config.licence
        self.label = Path(config.path).name.split(".")[0] or "path"
        found = files.find(config.path, SUFFIXES)
        unknown = [f for f in found if not f.name.lower().endswith(SUFFIXES)]
        if unknown:
            raise UserError(f"{unknown[0]}: cannot tell what is in it; known: {', '.join(SUFFIXES)}")
        self.parts = []
        for suffixes, build in (
            (text.SUFFIXES, lambda f: text.TextSource(self.where, f, config.separator, None, config.encoding)),
            (jsonl.SUFFIXES, lambda f: jsonl.JsonlSource(self.where, f, config.fields, None, config.encoding)),
            (parquet.SUFFIXES, lambda f: parquet.ParquetSource(self.where, f, config.fields, None)),
        ):
            of_kind = [f for f in found if f.name.lower().endswith(suffixes)]
            if of_kind:
                self.parts.append(build(of_kind))

    def fingerprint(self) -> str:
        return hashlib.sha256("".join(p.fingerprint() for p in self.parts).encode()).hexdigest()

    def documents(self) -> Iterator[Document | BadRecord]:
        for part in self.parts:
            yield from part.documents()


@sources.register("path")
def path(config: PathConfig) -> PathSource:
    return PathSource(config)
