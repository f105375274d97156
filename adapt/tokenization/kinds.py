"""Which kind of tokenizer a folder has, and whether a method serves it."""

from __future__ import annotations

from pathlib import Path

from adapt.components import TokenizerMethodChoice, tokenizer_methods
from adapt.errors import Problem, UserError
from adapt.tokenization.base import Base
from adapt.tokenization.byte_bpe import ByteBpe


def read_base(folder: Path, where: str = "base") -> Base:
    """Raises UserError, naming `where`, for a folder whose tokenizer cannot be extended."""
    models = sorted(path.name for path in folder.glob("*.model"))
    if models:
        from adapt.tokenization.sentencepiece_model import SentencePiece

        if (found := SentencePiece.read(folder, where)) is not None:
            return found
    try:
        return ByteBpe.read(folder, where)
    except UserError as error:
        if not models:
            raise
        what = f" ({', '.join(models)} is damaged, or no SentencePiece model)"
        raise UserError([Problem(p.where, p.what + what) for p in error.problems]) from None


def wrong_method(base: Base, choice: TokenizerMethodChoice) -> Problem | None:
    """What to say where the recipe's method does not serve this kind of tokenizer."""
    served = _kinds(choice.name)
    if not served or base.kind in served:
        return None
    others = [name for name in tokenizer_methods.names() if base.kind in _kinds(name)]
    what = f"{choice.name} extends {' and '.join(served)}, and the base is {base.kind}: take {' or '.join(others)}"
    return Problem("method", what)


def _kinds(name: str) -> tuple[str, ...]:
    return getattr(tokenizer_methods[name].builds, "kinds", ())
