"""Getting a .deb: through this machine's apt, or from a Debian archive over HTTPS. Nothing is installed; no root needed.

apt works on private State and Cache folders, so it neither reads nor changes what the machine has installed; it checks
signatures itself. Over HTTPS the package must have the sha256 that the archive's index states.
"""

from __future__ import annotations

import http.client
import logging
import lzma
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapt import wheels
from adapt.data import debs
from adapt.errors import NotReachable, UserError

ARCHIVE = "https://deb.debian.org/debian"
ARCHITECTURES = ("all", "amd64")
"""Indices that are looked into; documentation mostly belongs to `all`."""
FRESH_S = 3600
"""Package lists younger than this are not asked for again."""
OS_RELEASE = Path("/etc/os-release")
log = logging.getLogger("adapt.data")


@dataclass(frozen=True)
class Wanted:
    package: str
    version: str | None
    """None: the one that is offered."""
    suite: str | None
    """`bookworm`, ...; None: what this machine's apt offers, or Debian stable."""
    archive: str | None
    """Base address; None: this machine's apt where it serves the suite, else `ARCHIVE`."""

    def __str__(self) -> str:
        return f"Debian package {self.package}" + (f"={self.version}" if self.version else "")


def fetch(wanted: Wanted, lists: Path, into: Path) -> Path:
    """The .deb, in the folder `into`; package lists are kept in `lists`. Raises NotReachable with what each way said."""
    ways: list[Callable[[Wanted, Path, Path], Path]] = [_from_archive]
    if wanted.archive is None and _apt_serves(wanted.suite):
        ways.insert(0, _from_apt)
    said: list[str] = []
    log.info("fetching %s", wanted)
    for way in ways:
        try:
            return way(wanted, lists, into)
        except NotReachable as error:
            said.append(str(error))
    raise NotReachable(f"{wanted} is not in the cache and could not be fetched: {'; '.join(said)}")


def _apt_serves(suite: str | None) -> bool:
    if not shutil.which("apt-get"):
        return False
    return suite is None or suite in re.findall(r'^VERSION_CODENAME="?([\w-]+)', _os_release(), re.MULTILINE)


def _os_release() -> str:
    try:
        return OS_RELEASE.read_text()
    except OSError:
        return ""


def _from_apt(wanted: Wanted, lists: Path, into: Path) -> Path:
    state = lists / "apt"
    for folder in (state / "lists" / "partial", state / "cache" / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    options = {
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
        "APT::Sandbox::User": "root",  # the unprivileged user could not write into our folders
        "Acquire::Retries": 2,
        "Acquire::http::Timeout": 20,
    }
    command = ["apt-get", "-qq", *(part for k, v in options.items() for part in ("-o", f"{k}={v}"))]
    stamp = state / "updated"
    if not _is_fresh(stamp):
        _apt([*command, "update"], into)
        stamp.touch()
    _apt([*command, "download", wanted.package + (f"={wanted.version}" if wanted.version else "")], into)
    found = list(into.glob("*.deb"))
    if len(found) != 1:
        raise NotReachable("apt-get brought no package")
    return found[0]


def _apt(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        raise NotReachable(f"apt-get {command[-2] if 'download' in command else 'update'}: {(lines or ['failed'])[0]}")


def _from_archive(wanted: Wanted, lists: Path, into: Path) -> Path:
    archive, suite = (wanted.archive or ARCHIVE).rstrip("/"), wanted.suite or "stable"
    offered = []
    for architecture in ARCHITECTURES:
        for entry in _index(archive, suite, architecture, lists, wanted.package):
            if wanted.version in (None, entry["Version"]):
                return _download(f"{archive}/{entry['Filename']}", entry["SHA256"], into)
            offered.append(entry["Version"])
    has = f"it has {', '.join(offered)}; remove `version`, or name that one" if offered else "is `suite` the right one?"
    raise NotReachable(f"{archive} has no {str(wanted).removeprefix('Debian package ')} in {suite}: {has}")


def _index(archive: str, suite: str, architecture: str, lists: Path, package: str) -> list[dict[str, str]]:
    """The index paragraphs of one package."""
    address = f"{archive}/dists/{suite}/main/binary-{architecture}/Packages.xz"
    kept = lists / (re.sub(r"[^\w.-]+", "-", address) + ".txt")
    if not _is_fresh(kept):
        lists.mkdir(parents=True, exist_ok=True)
        try:
            kept.write_bytes(lzma.decompress(_get(address)))
        except lzma.LZMAError as error:
            raise NotReachable(f"{address}: {error}") from None
    text = kept.read_text("utf-8", "replace")
    starts = re.finditer(rf"^Package: {re.escape(package)}\n", text, re.MULTILINE)
    return [debs.fields(text[m.start() : text.find("\n\n", m.start()) + 1 or None]) for m in starts]


def _download(address: str, expected: str, into: Path) -> Path:
    file = into / address.rpartition("/")[2]
    file.write_bytes(_get(address))
    actual = wheels.sha256(file)
    if actual != expected:
        file.unlink()
        raise UserError(f"{address} has sha256 {actual}, and the archive's index states {expected}; it was not opened")
    return file


def _get(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return answer.read()
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        raise NotReachable(f"{address}: {getattr(error, 'reason', None) or error}") from None


def _is_fresh(file: Path) -> bool:
    return file.is_file() and time.time() - file.stat().st_mtime < FRESH_S
