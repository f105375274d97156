"""What a checkpoint's files held when they were written: a bit that flipped since is found before it is trained on.

A file is summed from what is handed over to be written, not from what can be read back, so one that never arrived counts
as damaged, too. `SHA256SUMS` is of the form that `sha256sum -c` reads.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem

from adapt.distributed.world import together

SUMS = "SHA256SUMS"


class SummingWriter(dcp.FileSystemWriter):
    """DCP's writer; `sums` is file -> SHA-256 of what this rank has written and synced."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        self.fs = _Summing()

    @property
    def sums(self) -> dict[str, str]:
        return self.fs.sums


class _Summing(FileSystem):
    def __init__(self) -> None:
        self.sums: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with _Stream(io.FileIO(path, mode)) as stream:
            yield stream
        self.sums[Path(path).name] = stream.digest.hexdigest()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class _Stream(io.BufferedWriter):
    def __init__(self, raw: io.RawIOBase):
        super().__init__(raw)
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return super().write(data)

    def fileno(self) -> int:
        self.flush()  # DCP asks for it to sync the file, and leaves in our buffer what it has not flushed
        return super().fileno()


def put(path: Path, text: str) -> str:
    """Write a small file through to the disk. Returns its SHA-256."""
    data = text.encode()
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def put_sums(folder: Path, sums: dict[str, str]) -> None:
    put(folder / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))


def sync_folder(folder: Path) -> None:
    """Make the names in it (a rename, say) outlive a power cut, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot; their server keeps the order
            os.fsync(handle)
    finally:
        os.close(handle)


def damage_of(folder: Path) -> str:
    """What is wrong with a checkpoint's files, "" where nothing is. Collective: each rank reads its share."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return next(filter(None, together(lambda: damage(folder, rank, size))), "")


def damage(folder: Path, rank: int = 0, size: int = 1) -> str:
    """What is wrong with this rank's share of the files (every size-th one is read), in words; "" where nothing is. A
    checkpoint without sums was written before there were any: nothing is known of it."""
    try:
        if not (folder / SUMS).is_file():
            return ""
        text = (folder / SUMS).read_text()
        if not text.endswith("\n"):
            raise ValueError(text)
        sums = dict(reversed(line.split("  ", 1)) for line in text[:-1].split("\n"))
        there = {p.name for p in folder.iterdir()} - {SUMS}
        for name in sorted(sums.keys() ^ there):
            return f"{name} is gone" if name in sums else f"{SUMS} does not know {name}"
        for name, digest in sorted(sums.items())[rank::size]:
            if _sum(folder / name) != digest:
                return f"{name} does not hold what was written to it ({SUMS})"
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror}"
    except ValueError:  # not text, or lines that are none
        return f"{SUMS} does not hold what was written to it"
    return ""


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
