"""Plain text: `.txt` and `.md` files, a document each or split at a separator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapt.components import sources
from adapt.data import files
from adapt.data.documents import Document

SUFFIXES = (".txt", ".md")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    path: str
    """File, folder (its .txt and .md files at any depth) or glob pattern."""
    separator: str | None = None
    """Text between documents within a file (`"\\n\\n\\n"`, `"<|endoftext|>"`); null: a file is one document."""
    licence: str | None = None
    """Printed in the manifest and the model card."""

    def __post_init__(self) -> None:
        if self.separator == "":
            raise ValueError("separator='' parts nothing; give the text between documents, or null")


class TextSource:
    def __init__(self, where: str, found: list[Path], separator: str | None, licence: str | None):
        self.where, self.files, self.separator, self.licence = where, found, separator, licence
        self.label = Path(where).stem or "text"

    def fingerprint(self) -> str:
        return files.fingerprint(self.files, "text", self.separator)

    def documents(self) -> Iterator[Document]:
        for file in self.files:
            text = files.read_text(file)
            pieces = text.split(self.separator) if self.separator else [text]
            for number, piece in enumerate(pieces):
                if piece.strip():
                    name = f"{file}#{number}" if self.separator else str(file)
                    yield Document(id=name, text=piece, meta={"part": file.name})


@sources.register("text")
def text(config: TextConfig) -> TextSource:
    return TextSource(config.path, files.find(config.path, SUFFIXES), config.separator, config.licence)
