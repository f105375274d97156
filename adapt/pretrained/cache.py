"""Folders that are made once: several processes may want one, and a half-made one must never be seen."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_dir() -> Path:
    """`$ADAPT_CACHE`, or `~/.cache/adapt`."""
    return Path(os.environ.get("ADAPT_CACHE") or "~/.cache/adapt").expanduser()


def make_once(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, built by `build(folder)` unless it is already there. Others wait; a failed build leaves nothing."""
    if target.is_dir():
        return target
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):
        if target.is_dir():
            return target
        with new_folder(target) as folder:
            build(folder)
    return target


class new_folder:
    """`with new_folder(target) as folder:` fill `folder`; it becomes `target` in one rename when the block succeeds."""

    def __init__(self, target: Path):
        self.target = target

    def __enter__(self) -> Path:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.", dir=self.target.parent))
        return self.folder

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            _open_up(self.folder)
            os.replace(self.folder, self.target)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)


def _open_up(folder: Path) -> None:
    """mkdtemp and safetensors write for the owner alone; what is published gets the permissions the umask allows."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
