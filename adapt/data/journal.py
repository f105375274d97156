"""How far a preparation came, so that after any interruption the same command goes on from there.

Beside the growing files lies `journal.json`, replaced atomically at every commit: it states how long each file was then.
Going on cuts the files to those lengths; what was written after the last commit is done again.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

SECONDS = 10.0
"""Between commits, each of which waits for the disk."""
NAME = "journal.json"
log = logging.getLogger("adapt.data")


class Journal:
    def __init__(self, folder: Path, key: str):
        self.file, self.key = folder / NAME, key
        self._last = time.monotonic()

    def read(self) -> dict[str, Any] | None:
        """The last commit's state; None where there is none that fits."""
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            if found["key"] == self.key:
                return found["state"]
            log.warning("%s: what was left by an interrupted preparation is of other data; starting afresh", self.file)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: an interrupted preparation left it unreadable (%s); starting afresh", self.file, error)
        return None

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._last >= SECONDS

    def write(self, state: dict[str, Any]) -> None:
        """The files it speaks of are on the disk already."""
        temporary = self.file.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump({"key": self.key, "state": state}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, self.file)
        folder = os.open(self.file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._last = time.monotonic()

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
