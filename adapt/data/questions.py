"""A prompt and its answer as tokens, exactly as training rows have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapt.data.batch import TARGET
from adapt.data.documents import BadRecord, Document, Messages
from adapt.data.encode import Encoder
from adapt.errors import UserError


@dataclass(frozen=True)
class Question:
    prompt: list[int]
    answer: list[int]
    """Without the token that ends it."""
    ends: tuple[int, ...] = ()
    """The special tokens that end the answer in a training row."""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


class Asker:
    """Prompts and answers -> tokens, exactly as training rows have them: through the chat template if there is one."""

    def __init__(self, tokenizer: Any, plain: bool = False):
        """`plain`: as text to go on with, even where there is a chat template."""
        self.encoder = Encoder(tokenizer)
        self.encoder.has_template = self.encoder.has_template and not plain
        self.special = set(tokenizer.all_special_ids)
        self.chat = self.encoder.has_template
        """Whether there is a chat template, so that an answer begins a turn and no word."""

    def __call__(self, prompt: str | Messages, answer: str, where: str = "a question") -> Question:
        tokens, roles = self._encoded(prompt, answer, where)
        first = roles.index(TARGET)
        last = len(roles) - roles[::-1].index(TARGET)
        if not first:
            raise UserError(f"{where}: the prompt is empty, so nothing predicts the answer's first token")
        found, ends = tokens[first:last], []
        while found and found[-1] in self.special:
            ends.append(found.pop())
        if not found:
            raise UserError(f"{where}: the answer {answer!r} has no tokens; nothing could be compared with it")
        return Question(tokens[:first], found, tuple(ends))

    def count(self, prompt: str | Messages, answer: str) -> int:
        """Tokens of the whole training row, with what ends it."""
        return len(self._encoded(prompt, answer, "a question")[0])

    def _encoded(self, prompt: str | Messages, answer: str, where: str) -> tuple[list[int], list[int]]:
        (result,) = self.encoder.encode([Document(id=where, prompt=prompt, response=answer)])
        if isinstance(result, BadRecord):
            raise UserError(f"{result.where}: {result.what}")
        (encoded,) = result
        if not encoded.roles or TARGET not in encoded.roles:
            raise UserError(f"{where}: the answer {answer!r} has no tokens; nothing could be compared with it")
        return encoded.tokens, encoded.roles
