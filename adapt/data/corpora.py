"""A corpus as a file: which sources, how they are cleaned and split, under which licences. See `adapt/corpora/*.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from adapt.components import CleanerChoice, SourceChoice
from adapt.config.decode import decode
from adapt.config.text import read_yaml
from adapt.data.documents import Source
from adapt.data.splits import Split
from adapt.errors import Problem, UserError, nearest

SHIPPED = Path(__file__).parents[1] / "corpora"


@dataclass(frozen=True, kw_only=True)
class CorpusPart:
    source: SourceChoice
    """Where the documents come from: any source but another corpus."""
    licence: str
    """Licence of these documents, as the work itself states it."""
    name: str | None = None
    """Label in manifests; null: the source's own."""
    fraction: float = 1.0
    """Share of the documents that is read, chosen by a hash of the text: a smaller one without a bias to the first files."""
    max_documents: int | None = None
    """Stop reading the source after so many documents (for streams that have no end worth waiting for)."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction} must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    about: str
    """One sentence: what it is and what for."""
    sources: tuple[CorpusPart, ...]
    """Where the documents come from; they are read in turn, the same number of characters of each."""
    clean: tuple[CleanerChoice, ...] = ()
    """Cleaning steps for every source, in order; run before those of the dataset."""
    split: Split = field(default_factory=Split)
    """Fractions of the documents, by a hash of each."""
    notes: str = ""
    """What else a user should know."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty")


def shipped_corpora() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_corpus(name: str) -> tuple[Corpus, list[tuple[CorpusPart, Source]]]:
    """The corpus of that name, or in the file of that path, and its sources, opened. All problems at once."""
    path = _file(name)
    try:
        data = read_yaml(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        corpus = decode(data, Corpus)
    except UserError as error:
        raise UserError(
            [Problem(f"{path}: {p.where}" if p.where else str(path), p.what) for p in error.problems]
        ) from None
    opened, problems = [], []
    for number, part in enumerate(corpus.sources):
        where = f"{path}: sources[{number}].source"
        try:
            source = part.source.build()
            if hasattr(source, "parts_of_corpus"):
                raise UserError("a corpus cannot hold another corpus; name its sources here")
            opened.append((part, source))
        except UserError as error:
            problems += [Problem(where, str(p)) for p in error.problems]
    labels = [part.name or source.label for part, source in opened]
    problems += [
        Problem(str(path), f"two sources are called {label!r}; give each a `name` of its own")
        for label in sorted({x for x in labels if labels.count(x) > 1})
    ]
    if problems:
        raise UserError(problems)
    return corpus, opened


def _file(name: str) -> Path:
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise UserError(f"there is no corpus file {name!r}")
    shipped = SHIPPED / f"{name}.yaml"
    if name in shipped_corpora():
        return shipped
    known = shipped_corpora()
    raise UserError(
        f"there is no corpus {name!r}.{nearest(name, known)} Shipped: {', '.join(known)}; or give the path of a .yaml file"
    )
