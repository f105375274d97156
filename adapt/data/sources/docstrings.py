"""The prose documentation of installed Python packages: real technical English that every machine already has.

Files are parsed, never imported. Whole packages are held out, so that no held-out text is a neighbour of training text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Literal

from adapt.components import sources
from adapt.data import prose
from adapt.data.documents import Document
from adapt.errors import UserError, nearest

PROJECT = "adapt-lm"
SKIPPED_FOLDERS = {"tests", "test", "testing", "_vendor", "vendored", "_vendored_packages"}


@dataclass(frozen=True, kw_only=True)
class DocstringsConfig:
    split: Literal["train", "held-out", "all"] = "all"
    """`held-out`: only the packages held out; `train`: only the others."""
    packages: tuple[str, ...] | Literal["requirements"] = "requirements"
    """Distribution names. `requirements`: every installed distribution that adapt-lm needs, directly or not."""
    held_out: tuple[str, ...] | float = 0.1
    """Packages held out: their names, or the fraction of packages, chosen by a hash of the name."""
    min_words: int = 40
    """Words of running prose a docstring needs to be kept."""

    def __post_init__(self) -> None:
        if isinstance(self.held_out, float) and not 0 <= self.held_out <= 1:
            raise ValueError(
                f"held_out={self.held_out} is a fraction of the packages: from 0 to 1, or give their names"
            )


class DocstringsSource:
    def __init__(self, config: DocstringsConfig):
        self.config = config
        self.label = "docstrings" if config.split == "all" else f"docstrings-{config.split}"
        self.licence = "each package's own (see `licences`)"
        names = required() if config.packages == "requirements" else sorted(map(normal, config.packages))
        self.where = f"docstrings of {len(names)} packages"
        installed = {name: _distribution(name) for name in names}
        missing = [name for name, found in installed.items() if found is None]
        if missing and config.packages != "requirements":
            raise UserError(f"docstrings: {', '.join(missing)} is not installed here.{_hint(missing[0])}")
        self.packages = {n: d for n, d in installed.items() if d and self._wanted(n, names)}
        if not self.packages:
            raise UserError(f"docstrings: the split {config.split!r} has no package; see `held_out`")

    def _wanted(self, name: str, names: list[str]) -> bool:
        held_out = self.config.held_out
        if isinstance(held_out, tuple):
            unknown = sorted({normal(n) for n in held_out} - set(names))
            if unknown:
                raise UserError(
                    f"docstrings: held_out names {unknown[0]!r}, not one of the packages.{nearest(unknown[0], names)}"
                )
            is_held_out = name in {normal(n) for n in held_out}
        else:
            is_held_out = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 < held_out
        return self.config.split == "all" or is_held_out == (self.config.split == "held-out")

    def fingerprint(self) -> str:
        versions = [(name, d.version) for name, d in self.packages.items()]
        return hashlib.sha256(repr((prose.VERSION, self.config.min_words, versions)).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        for name, distribution in self.packages.items():
            licence, version = _licence(distribution), distribution.version  # each parses the metadata again
            for module, source in _modules(distribution):
                for qualname, text in prose.docstrings(source):
                    if prose.is_prose(text, self.config.min_words):
                        facts = {
                            "part": name,
                            "package": name,
                            "version": version,
                            "licence": licence,
                        }
                        identity = f"{name}:{module}.{qualname}".rstrip(".")
                        yield Document(id=identity, text=text, meta={**facts, "module": module, "qualname": qualname})


@sources.register("docstrings")
def docstrings(config: DocstringsConfig) -> DocstringsSource:
    return DocstringsSource(config)


@cache
def required(project: str = PROJECT) -> list[str]:
    """Names of the installed distributions `project` needs, directly or not (without itself); sorted."""
    from packaging.requirements import Requirement

    seen: set[tuple[str, str]] = set()
    queue = [(project, "")]
    while queue:
        name, extra = queue.pop()
        distribution = _distribution(name)
        if (name, extra) in seen or distribution is None:
            continue
        seen.add((name, extra))
        for line in distribution.requires or []:
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                queue += [(normal(need.name), e) for e in ("", *need.extras)]
    return sorted({name for name, _ in seen} - {normal(project)})


def normal(name: str) -> str:
    import re

    return re.sub(r"[-_.]+", "-", name).lower()


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def _modules(distribution: metadata.Distribution) -> Iterator[tuple[str, str]]:
    """(dotted module, source text) of a distribution's Python files that may hold documentation, sorted."""
    for entry in sorted(distribution.files or (), key=str):
        parts = entry.parts
        if entry.suffix != ".py" or ".." in parts or SKIPPED_FOLDERS & set(parts[:-1]):
            continue
        if entry.name.startswith("test_") or entry.name.endswith("_pb2.py"):
            continue
        try:
            source = distribution.locate_file(entry).read_bytes().decode("utf-8")
        except (
            OSError,
            UnicodeDecodeError,
        ):  # a package's own broken or removed file is not the user's input
            continue
        yield ".".join(parts)[: -len(".py")].removesuffix(".__init__"), source


def _licence(distribution: metadata.Distribution) -> str:
    facts = distribution.metadata
    stated = facts.get("License-Expression") or facts.get("License") or ""
    if stated and "\n" not in stated and len(stated) < 80:
        return stated
    classes = [c.rpartition(" :: ")[2] for c in facts.get_all("Classifier") or [] if c.startswith("License ::")]
    return ", ".join(classes) or (stated.strip().splitlines() or ["not stated"])[0][:80]


def _hint(name: str) -> str:
    return nearest(name, (normal(d.name) for d in metadata.distributions() if d.name))
