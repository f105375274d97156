"""Plain text: `.txt` and `.md` files, a document each or split at a separator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapt.components import sources
from adapt.data import decoding, files
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
    encoding: str = "utf-8"
    """How bytes are read: `utf-8`, a name such as `cp1252` or `utf-16`, or `auto`: UTF-8 or what the bytes look like, counted in the manifest."""

    def __post_init__(self) -> None:
        decoding.check(self.encoding)
        if self.separator == "":
            raise ValueError("separator='' parts nothing; give the text between documents, or null")


class TextSource:
    def __init__(
        self, where: str, found: list[Path], separator: str | None, licence: str | None, encoding: str = "utf-8"
    ):
        self.where, self.files, self.separator, self.licence = where, found, separator, licence
        self.encoding = encoding
        self.label = Path(where).stem or "text"

    def fingerprint(self) -> str:
        return files.fingerprint(self.files, "text", self.separator, *decoding.option(self.encoding))

    def documents(self) -> Iterator[Document]:
        for file in self.files:
            text, encoding = decoding.text(file, self.encoding)
            facts = {"part": file.name} | ({"decoded_as": encoding} if self.encoding != decoding.UTF8 else {})
            pieces = text.split(self.separator) if self.separator else [text]
            for number, piece in enumerate(pieces):
                if piece.strip():
                    name = f"{file}#{number}" if self.separator else str(file)
                    yield Document(id=name, text=piece, meta=facts)


@sources.register("text")
def text(config: TextConfig) -> TextSource:
    return TextSource(config.path, files.find(config.path, SUFFIXES), config.separator, config.licence, config.encoding)
