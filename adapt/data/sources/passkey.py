"""Passkey retrieval as training data: the loss is on the key alone. The suite `passkey` asks for other keys."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from adapt.components import sources
from adapt.data.documents import Document
from adapt.errors import Problem

SALT = 0


@dataclass(frozen=True, kw_only=True)
class PasskeyConfig:
    length: int = 1024
    """Tokens of a document, with the key and what ends it; `data.seq_len` at most, or rows cut questions from answers."""
    count: int = 2000
    """Documents."""
    split: Literal["train", "held-out"] = "train"
    """Half of the five-digit numbers that keys are taken from; the suite's are of the held-out half."""
    prompt: Literal["chat", "plain"] = "chat"
    """`chat`: a user's turn and an answer, where the tokenizer has a chat template. `plain`: text to go on with; the suite
    asks so with its own `prompt: plain`."""
    seed: int = 0
    """Seeds keys and depths."""

    def __post_init__(self) -> None:
        for key in ("length", "count"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be 1 or more")

    def problems(self, recipe) -> Iterator[Problem]:
        if self.length > recipe.data.seq_len:
            yield Problem(
                "",
                f"texts of {self.length:,d} tokens are cut by rows of data.seq_len={recipe.data.seq_len:,d}, and the key "
                f"would stand in another row than the question: give a `length` of {recipe.data.seq_len:,d} or less",
            )


class PasskeySource:
    licence = "Apache-2.0"

    def __init__(self, config: PasskeyConfig):
        self.config, self.tokenizer = config, None
        self.label = "passkey" if config.split == "train" else "passkey-held-out"
        self.where = f"passkey texts of {config.length:,d} tokens"

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Lengths are in its tokens."""
        self.tokenizer = tokenizer

    def fingerprint(self) -> str:
        from adapt.data.needles import VERSION

        return hashlib.sha256(repr((VERSION, self.config)).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        from adapt.data.needles import Passkeys, as_answer, key_of, trial_rng
        from adapt.data.questions import Asker

        if self.tokenizer is None:
            raise RuntimeError("passkey texts have a length in tokens: use_tokenizer() comes first")
        config, plain = self.config, self.config.prompt == "plain"
        asker = Asker(self.tokenizer, plain=plain)
        generate = Passkeys(asker.count)
        for number in range(config.count):
            rng = trial_rng(config.seed, SALT, config.split == "train", config.length, number)
            key, depth = key_of(rng, config.split), float(rng.random())
            answer = as_answer(str(key), asker.chat)
            trial = generate(config.length, depth, key, answer)
            facts = {"part": f"{config.length} tokens", "key": key, "depth": depth}
            name = f"passkey:{config.split}:{number}"
            yield Document(id=name, prompt=trial.prompt, response=answer, plain=plain, meta=facts)


@sources.register("passkey")
def passkey(config: PasskeyConfig) -> PasskeySource:
    return PasskeySource(config)
