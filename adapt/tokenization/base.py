"""What a method of extension is, and what it works on: word counts in, new tokens out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from adapt.tokenization.continued_bpe import Learned


class Base(Protocol):
    """A tokenizer that can be extended: `ByteBpe` or `SentencePiece`."""

    kind: str
    """As it is called in a letter; a method names the kinds it serves."""
    text: str
    """tokenizer.json"""

    @property
    def added(self) -> dict[str, int]: ...

    @property
    def ids(self) -> dict[str, int]: ...

    @property
    def next_id(self) -> int: ...

    @property
    def merges(self) -> list: ...

    def tokenizer(self) -> Any: ...

    def work(self, cleaners: tuple) -> Any:
        """The `WordWork` that counts its words."""
        ...

    def grown(self, learned: Any) -> Base: ...

    def unreachable(self, tokens: Any) -> list[str]: ...

    def write(self, folder: Any) -> None:
        """What it has besides tokenizer.json."""
        ...

    def prove(self, new: Any, base: Any, folder: Any, texts: Any, method: Method) -> dict[str, list[str]]:
        """What was checked of `new`, an extension of this one -> what was found wrong (nothing, if all is well)."""
        ...

    def warnings(self, new: Any, texts: Any) -> list[str]:
        """What the user should know of `new` that its method did not promise."""
        ...


class Method(Protocol):
    kinds: tuple[str, ...]
    """Of tokenizers it extends."""
    coarsens: bool
    """Whether it promises that token boundaries are only removed; a result that breaks a promise is not written. A method
    that promises nothing is for comparison."""
    reaches: bool
    """Whether it promises that every new token is reached by its own text, and (SentencePiece) that both files give the
    same ids."""

    def __call__(self, base: Any, words: Mapping[str, int], num_tokens: int) -> Learned:
        """Up to `num_tokens` new tokens from the words of the corpus (as the tokenizer's kind has them -> occurrences)."""
        ...
