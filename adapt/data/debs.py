"""A Debian package (.deb) as a file: read without installing or unpacking it.

A .deb is an `ar` archive (deb(5)): `debian-binary`, `control.tar.*`, `data.tar.*`. Members are read into memory by name and
only plain files are looked at, so links and paths that lead out of the archive lead nowhere.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO

from adapt.errors import UserError

MAGIC = b"!<arch>\n"
HEADER = 60
"""Bytes of an ar member's header: name 16, date 12, owner 6, group 6, mode 8, size 10, end mark 2."""
MAX_FILE = 64 * 2**20
"""Bytes of one file, unpacked; larger ones are passed over."""
UNPACK = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
BROKEN = (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, ValueError)


def control(deb: Path) -> dict[str, str]:
    """The package's control fields (`Package`, `Version`, ...)."""
    for name, data in _files(deb, "control.tar"):
        if name == "control":
            return fields(data.decode("utf-8", "replace"))
    raise UserError(f"{deb}: has no control file; it is no Debian package")


def fields(paragraph: str) -> dict[str, str]:
    """`Name: value` lines of a control paragraph; continuation lines are left out."""
    pairs = (line.split(":", 1) for line in paragraph.splitlines() if ":" in line and not line[0].isspace())
    return {name: value.strip() for name, value in pairs}


def files(deb: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """(path without a leading `./`, contents) of the plain files whose path matches one of the glob `patterns` (`*` also
    crosses `/`), in the order of the archive. Compressed files are unpacked, their suffix stays in the path."""
    yield from _files(deb, "data.tar", patterns)


def _files(deb: Path, part: str, patterns: tuple[str, ...] = ("*",)) -> Iterator[tuple[str, bytes]]:
    try:
        with _tar(deb, part) as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if member.isfile() and member.size <= MAX_FILE and any(fnmatchcase(name, p) for p in patterns):
                    data = tar.extractfile(member).read()
                    if unpack := UNPACK.get(Path(name).suffix):
                        with unpack(io.BytesIO(data)) as packed:
                            data = packed.read(MAX_FILE + 1)
                    if len(data) <= MAX_FILE:
                        yield name, data
    except BROKEN as error:
        raise UserError(f"{deb}: cannot be read: {error}; remove it, and it is fetched again") from None


@contextmanager
def _tar(deb: Path, part: str) -> Iterator[tarfile.TarFile]:
    with deb.open("rb") as file:
        name = _seek(file, part)  # what follows it in the ar archive lies behind the end of the tar
        if name is None:
            raise UserError(f"{deb}: has no {part}; it is no Debian package")
        if name.endswith(".zst"):  # Ubuntu's; Python 3.11 cannot read it
            with _zstd(deb, part) as tar:
                yield tar
        else:
            with tarfile.open(fileobj=file, mode="r|*") as tar:
                yield tar


def _seek(file: IO[bytes], part: str) -> str | None:
    """Moves to the contents of the first ar member whose name begins with `part`."""
    if file.read(len(MAGIC)) != MAGIC:
        return None
    while len(header := file.read(HEADER)) == HEADER:
        name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
        if name.startswith(part):
            return name
        file.seek(size + size % 2, io.SEEK_CUR)
    return None


@contextmanager
def _zstd(deb: Path, part: str) -> Iterator[tarfile.TarFile]:
    option = "--ctrl-tarfile" if part == "control.tar" else "--fsys-tarfile"
    try:
        process = subprocess.Popen(["dpkg-deb", option, str(deb)], stdout=subprocess.PIPE)
    except FileNotFoundError:
        raise UserError(
            f"{deb.name} is packed with zstd, which needs dpkg-deb, and that is not here; name a Debian `suite` (bookworm): "
            "its packages are packed with xz"
        ) from None
    with process, tarfile.open(fileobj=process.stdout, mode="r|") as tar:
        yield tar
