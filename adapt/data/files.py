"""Local files of a source: found, fingerprinted and read with errors that name the file and the byte."""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from adapt.errors import UserError

WHOLE = 256 * 2**20
"""Up to so many bytes in all, contents are hashed; beyond, sizes, times and the ends of each file."""
END = 2**20
NEWLINE = b"\n"


def find(path: str, suffixes: Iterable[str]) -> list[Path]:
    """The files a path means: itself, all with one of `suffixes` below a folder, or the matches of a glob; sorted."""
    suffixes = tuple(suffixes)
    if not path.strip():
        raise UserError("the path is empty; give a file, a folder or a glob pattern (`.` is the working directory)")
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if root.is_dir():
        files = [p for p in root.rglob("*") if p.is_file() and p.name.lower().endswith(suffixes)]
        if not files:
            raise UserError(f"{path}: the folder has no {', '.join(suffixes)} file")
        return sorted(files)
    files = [Path(p) for p in glob.glob(str(root), recursive=True) if Path(p).is_file()]
    if not files:
        is_pattern = glob.has_magic(path)
        raise UserError(f"{path}: {'no file matches' if is_pattern else 'there is no such file or folder'}")
    return sorted(files)


def fingerprint(files: list[Path], *options: object) -> str:
    """Of the contents and of the options they are read with; not of the place they lie at."""
    digest = hashlib.sha256(repr(options).encode())
    root = files[0].parent
    try:
        stats = [f.stat() for f in files]
        whole = sum(s.st_size for s in stats) <= WHOLE
        for file, stat in zip(files, stats, strict=True):
            name = file.relative_to(root) if file.is_relative_to(root) else file.name
            digest.update(f"\0{name}\0{stat.st_size}\0{'' if whole else stat.st_mtime_ns}\0".encode())
            with file.open("rb") as stream:
                if whole or stat.st_size <= 2 * END:
                    for piece in iter(lambda stream=stream: stream.read(END), b""):
                        digest.update(piece)
                else:
                    digest.update(stream.read(END))
                    stream.seek(-END, 2)
                    digest.update(stream.read(END))
    except OSError as error:
        raise unreadable(error.filename or root, error) from None
    return digest.hexdigest()


def read_text(file: Path) -> str:
    """The file as UTF-8, without a byte-order mark and with `\\n` line ends."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise unreadable(file, error) from None
    return decode(data, str(file), lines=True).removeprefix("\ufeff").replace("\r\n", "\n")


def decode(data: bytes, where: str, start: int = 0, lines: bool = False) -> str:
    """`data` begins at byte `start` of what `where` names; `lines`: it has several, so the line is named too."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        where = f"{where}:{data.count(NEWLINE, 0, error.start) + 1}" if lines else where
        raise UserError(
            f"{where}: byte {start + error.start:,d} (0x{byte:02x}) is not UTF-8; convert the file "
            "(for instance with `iconv -t UTF-8`), remove it, or set encoding=auto"
        ) from None


def lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset of the line, the line without its end or a byte-order mark). Reads `.gz` too."""
    number = offset = 0
    try:
        with open_bytes(file) as stream:
            for line in stream:  # without `enumerate`, which would hold on to it
                number += 1
                if number == 1 and line.startswith(codecs.BOM_UTF8):
                    offset, line = len(codecs.BOM_UTF8), line[len(codecs.BOM_UTF8) :]
                size, line = len(line), line.rstrip(b"\r\n")
                yield number, offset, line
                del line  # lines may be huge: one is in memory at a time
                offset += size
    except (OSError, EOFError) as error:  # EOFError: a cut gzip file
        raise unreadable(file, error) from None


def unreadable(file: object, error: Exception) -> UserError:
    return UserError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}")


def head(file: Path, size: int) -> bytes:
    """The first bytes of a file; of a `.gz`, of what it holds."""
    try:
        with open_bytes(file) as stream:
            return stream.read(size)
    except (OSError, EOFError) as error:
        raise unreadable(file, error) from None


def open_bytes(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")
