"""The documents of a Debian package: manual pages, HTML, plain text. The package is fetched, never installed.

Texts come as they are; `meta["media"]` says of what kind (`html`, `man`, `text`), and the cleaning step `markup` makes prose
of them. The .deb stays in the cache, and later runs read it there: to move to a newer one, give its `version`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from adapt import wheels
from adapt.components import sources
from adapt.data import debian_archive, debs
from adapt.data.cache import cache_folder
from adapt.data.documents import BadRecord, Document
from adapt.errors import UserError

VERSION = 1
"""Part of the fingerprint: raise it when the documents change."""
PACKED = (".gz", ".xz", ".bz2")
MEDIA = {".html": "html", ".htm": "html", ".xhtml": "html", ".txt": "text", ".md": "text", ".rst": "text"}
MAN_PAGE = re.compile(r"(?:^|/)man/(?:[^/]+/)?man\d\w*/[^/]+\.\d\w*$")
CHARSET = re.compile(rb"charset=[\"']?([\w-]+)|coding:\s*([\w-]+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class DebianConfig:
    package: str
    """Name of the binary package (`libssl-doc`)."""
    files: tuple[str, ...] = ("usr/share/doc/*", "usr/share/man/*")
    """Glob patterns of paths in the package (`*` also crosses `/`). Of what matches, manual pages and .html, .txt, .md and
    .rst files are read, also compressed ones."""
    exclude: tuple[str, ...] = ()
    """Glob patterns of paths that are left out."""
    suite: str | None = None
    """Debian release (`bookworm`). null: what this machine's apt offers, or else Debian stable."""
    version: str | None = None
    """Version of the package; null: the one in the cache, or else the one that is offered."""
    archive: str | None = None
    """Address of a Debian archive. null: this machine's apt where it serves the suite, else deb.debian.org."""
    sha256: str | None = None
    """Hash the .deb must have; null: any."""
    licence: str | None = None
    """Printed in the manifest and the model card; see usr/share/doc/<package>/copyright in the package."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.package):
            raise ValueError(f"package={self.package!r} is not the name of a Debian package")
        for name in ("suite", "version"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[A-Za-z0-9][\w.:~+-]*", value):
                raise ValueError(f"{name}={value!r} is none")


class DebianSource:
    remote = True

    def __init__(self, config: DebianConfig):
        self.config = config
        self.label, self.licence = config.package, config.licence
        self.where = f"Debian package {config.package}"
        self._cache = cache_folder(None)

    def use_cache(self, folder: Path) -> None:
        self._cache = folder

    def check(self) -> None:
        """Looks at the package if the cache has it; else it is fetched when it is first read, not for this."""
        if self._folder.is_dir():
            self.fingerprint()

    def fetch(self) -> None:
        """Brings the package into the cache."""
        self.fingerprint()

    def fingerprint(self) -> str:
        c = self.config
        return hashlib.sha256(repr((VERSION, *self._identity, c.files, c.exclude, c.licence)).encode()).hexdigest()

    def documents(self) -> Iterator[Document | BadRecord]:
        c = self.config
        version, sha256 = self._identity
        facts = {"part": c.package, "package": c.package, "version": version, "sha256": sha256, "licence": c.licence}
        found = False
        for path, data in debs.files(self._deb, c.files):
            media = _media(path)
            if media is None or any(debs.fnmatchcase(path, p) for p in c.exclude):
                continue
            found = True
            text = _decode(data)
            if text is None:
                yield BadRecord(f"{c.package}:{path}", "is neither UTF-8 nor in the character set it names")
            elif text.strip():
                yield Document(id=f"{c.package}:{path}", text=text, meta=facts | {"file": path, "media": media})
        if not found:
            raise UserError(f"{self.where}: no readable file matches {', '.join(c.files)}. {self._contents()}")

    @property
    def _folder(self) -> Path:
        c = self.config
        name = re.sub(r"[^\w.+~-]", "-", c.package + (f"={c.version}" if c.version else ""))
        return self._cache / "debian" / (c.suite or "any") / name

    @cached_property
    def _deb(self) -> Path:
        """The package in the cache, fetched there if need be."""
        from adapt.pretrained.cache import make_once

        c, folder = self.config, self._folder
        wanted = debian_archive.Wanted(c.package, c.version, c.suite, c.archive)
        try:
            make_once(folder, lambda into: debian_archive.fetch(wanted, folder.parent / "lists", into) and None)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written: {error.strerror}; `data.cache` or $ADAPT_CACHE chooses another folder"
            ) from None
        return next(folder.glob("*.deb"))

    @cached_property
    def _identity(self) -> tuple[str, str]:
        """(version, sha256) of the package."""
        stated, actual = self.config.sha256, wheels.sha256(self._deb)
        if stated and stated.lower() != actual:
            raise UserError(f"{self._deb} has sha256 {actual}, not {stated} as `sha256` says; it was not opened")
        return debs.control(self._deb)["Version"], actual

    def _contents(self) -> str:
        paths = [path for path, _ in debs.files(self._deb, ("*",)) if _media(path)]
        folders = sorted({path.rpartition("/")[0] for path in paths})
        return f"It has readable files in: {', '.join(folders[:8])}" if folders else "It has no readable file at all."


def _media(path: str) -> str | None:
    for suffix in PACKED:
        path = path.removesuffix(suffix)
    return "man" if MAN_PAGE.search(path) else MEDIA.get(Path(path).suffix.lower())


def _decode(data: bytes) -> str | None:
    match = CHARSET.search(data[:2048])
    stated = next((group.decode() for group in match.groups() if group), None) if match else None
    for charset in ("utf-8-sig", stated):
        try:
            return data.decode(charset).replace("\r\n", "\n") if charset else None
        except (UnicodeDecodeError, LookupError):
            continue
    return None


@sources.register("debian")
def debian(config: DebianConfig) -> DebianSource:
    return DebianSource(config)
