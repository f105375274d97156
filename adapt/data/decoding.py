"""Bytes of text files -> text: UTF-8, an encoding by name, or (`auto`) whatever they turn out to be.

`auto` takes a byte-order mark at its word, then UTF-8, and where that fails what charset-normalizer makes of the
non-ASCII lines, then Windows-1252, then Latin-1, in which everything can be read. A file may be mixed: lines of JSONL
are decided one by one. What was read how is counted in the manifest.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path

from adapt.data import files
from adapt.errors import UserError

AUTO, UTF8 = "auto", "utf-8"
MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
         (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
"""The mark of UTF-32 begins with that of UTF-16."""
SAMPLE = 2**16


def check(encoding: str) -> None:
    """Raises ValueError, for a config."""
    if encoding == AUTO:
        return
    try:
        "".encode(encoding)
    except (LookupError, TypeError):
        raise ValueError(
            f"encoding={encoding!r} is none; give utf-8, auto, or a name such as cp1252 or utf-16"
        ) from None


def option(encoding: str) -> tuple[str, ...]:
    """Its part of a source's fingerprint."""
    return () if encoding == UTF8 else (encoding,)


def text(file: Path, encoding: str) -> tuple[str, str]:
    """(the file as text with `\\n` line ends and without a byte-order mark, the encoding it was read in)."""
    if encoding == UTF8:
        return files.read_text(file), UTF8
    try:
        data = file.read_bytes()
    except OSError as error:
        raise files.unreadable(file, error) from None
    found, used = _Decoder(file, encoding, data[:4]).decode(data, str(file))
    return found.removeprefix("\ufeff").replace("\r\n", "\n"), used


def lines(file: Path, encoding: str) -> Iterator[tuple[int, str | UserError, str]]:
    """(line number from 1, the line or what is wrong with it, the encoding it was read in)."""
    decoder = _Decoder(file, encoding, files.head(file, 4))
    if decoder.is_wide:
        yield from _wide_lines(file, decoder.encoding)
        return
    for number, offset, line in files.lines(file):
        where, used = f"{file}:{number}", encoding
        text: str | UserError
        try:
            if encoding == UTF8:
                text = files.decode(line, where, offset)
            else:
                text, used = decoder.decode(line, where)
        except UserError as error:
            text = error
        del line  # may be huge
        yield number, text, used
        del text


def _wide_lines(file: Path, encoding: str) -> Iterator[tuple[int, str | UserError, str]]:
    """Of encodings in which a line end is more than one byte."""
    number = 0
    try:
        with files.open_bytes(file) as raw, io.TextIOWrapper(raw, encoding=encoding) as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.rstrip("\n").removeprefix("\ufeff"), encoding
    except (OSError, EOFError, UnicodeError) as error:
        raise files.unreadable(f"{file}, after line {number}, as {encoding}", error) from None


class _Decoder:
    def __init__(self, file: Path, encoding: str, head: bytes):
        self.file = file
        marked = next((name for mark, name in MARKS if head.startswith(mark)), None)
        self.encoding = (marked or AUTO) if encoding == AUTO else encoding
        self.is_wide = self.encoding != AUTO and len("\n".encode(self.encoding).removeprefix(b"\xff\xfe")) > 1
        self._guess: str | None = None

    def decode(self, data: bytes, where: str) -> tuple[str, str]:
        """Raises UserError where a named encoding does not fit."""
        if self.encoding != AUTO:
            try:
                return data.decode(self.encoding), self.encoding
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{where}: byte {error.start:,d} (0x{data[error.start]:02x}) is not {self.encoding}; "
                    "encoding=auto finds out, line by line"
                ) from None
        for encoding in (UTF8, None, "cp1252"):
            encoding = encoding or self._guessed(data)
            try:
                return data.decode(encoding), encoding
            except (UnicodeDecodeError, LookupError):
                continue
        return data.decode("latin-1"), "latin-1"

    def _guessed(self, data: bytes) -> str:
        """Of the whole file, at its first bytes that are not UTF-8: a line alone is too little to tell."""
        if self._guess is None:
            from charset_normalizer import from_bytes

            telling = bytearray()
            for _, _, line in files.lines(self.file):
                if not _is_utf8(line):
                    telling += line[:SAMPLE] + b"\n"
                if len(telling) >= SAMPLE:
                    break
            best = from_bytes(bytes(telling) or data[:SAMPLE]).best()
            likely = [] if best is None else [best.encoding, *best.could_be_from_charset]
            self._guess = "cp1252" if "cp1252" in likely or not likely else likely[0]  # of equals, the usual one
        return self._guess


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
