"""Parquet files, read a row group at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from adapt.components import sources
from adapt.data import files
from adapt.data.documents import BadRecord, Document
from adapt.data.records import Fields, to_document

SUFFIXES = (".parquet",)


@dataclass(frozen=True, kw_only=True)
class ParquetConfig:
    path: str
    """File, folder (its .parquet files at any depth) or glob pattern."""
    fields: Fields = field(default_factory=Fields)
    """Names of the columns, where they are not the usual ones."""
    licence: str | None = None
    """Printed in the manifest and the model card."""


class ParquetSource:
    def __init__(self, where: str, found: list[Path], fields: Fields, licence: str | None):
        self.where, self.files, self.fields, self.licence = where, found, fields, licence
        self.label = Path(where).stem or "parquet"

    def fingerprint(self) -> str:
        return files.fingerprint(self.files, "parquet", self.fields)

    def documents(self) -> Iterator[Document | BadRecord]:
        import pyarrow
        import pyarrow.parquet

        for file in self.files:
            number = 0
            try:
                with pyarrow.parquet.ParquetFile(file) as table:
                    for batch in table.iter_batches(batch_size=1024):
                        for record in batch.to_pylist():
                            present = {k: v for k, v in record.items() if v is not None}
                            yield to_document(present, self.fields, f"{file}:row {number}", file.name)
                            number += 1
            except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
                raise files.unreadable(f"{file}, after row {number}", error) from None


@sources.register("parquet")
def parquet(config: ParquetConfig) -> ParquetSource:
    return ParquetSource(config.path, files.find(config.path, SUFFIXES), config.fields, config.licence)
