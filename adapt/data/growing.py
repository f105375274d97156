"""A file that only grows, and can be cut back to a length at which it was known to be whole."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

PIECE = 2**20


class Damaged(Exception):
    """A file is not what the journal says of it."""


class GrowingFile:
    def __init__(self, path: Path, dtype: str = "uint8", shape: list[int] | None = None, size: int = 0):
        """Begun anew, or (`size`) cut to its first bytes and gone on with. `dtype` and `shape` of an entry."""
        self.path, self.dtype, self.shape = path, dtype, shape or []
        self.size, self._digest = size, hashlib.sha256()
        self._file = path.open("r+b" if size else "wb")
        left = size
        while left:
            data = self._file.read(min(PIECE, left))
            if not data:
                self._file.close()
                raise Damaged(f"{path} is shorter than {size:,d} bytes")
            self._digest.update(data)
            left -= len(data)
        self._file.truncate(size)
        self._file.seek(size)

    @classmethod
    def reopen(cls, folder: Path, facts: dict[str, Any]) -> GrowingFile:
        """As `commit` told. Raises Damaged if its contents are others."""
        try:
            file = cls(folder / facts["name"], facts["dtype"], facts["shape"], facts["bytes"])
        except OSError as error:
            raise Damaged(f"{facts['name']}: {error.strerror}") from None
        if file._digest.hexdigest() != facts["sha256"]:
            file.close()
            raise Damaged(f"{file.path} has other contents than were written")
        return file

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def commit(self) -> dict[str, Any]:
        """On the disk for good; what `reopen` needs."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {
            "name": self.path.name,
            "dtype": self.dtype,
            "shape": self.shape,
            "bytes": self.size,
            "sha256": self._digest.copy().hexdigest(),
        }

    def array(self) -> np.ndarray:
        """[entries, *shape], memory-mapped."""
        if not self._file.closed:
            self._file.flush()
        if not self.size:
            return np.empty((0, *self.shape), self.dtype)
        return np.memmap(self.path, self.dtype, "r").reshape(-1, *self.shape)

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"bytes": self.size, "sha256": self._digest.hexdigest()}


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
