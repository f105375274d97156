"""Documents -> token ids, with the role of each token where a document has given and learned parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from adapt.data.chat import BadConversation, Chat
from adapt.data.documents import BadRecord, Document, Messages
from adapt.data.plain_text import PlainText, through
from adapt.data.roles import CONTEXT, TARGET
from adapt.errors import UserError


@dataclass(frozen=True)
class Encoded:
    """A sequence of tokens. Of a preference pair there are two, chosen first."""

    tokens: Sequence[int] | np.ndarray
    roles: list[int] | None
    """CONTEXT or TARGET per token; None: all TARGET."""
    num_bytes: int
    """UTF-8 bytes of the learned text: all of a plain document, the answers of a conversation."""


def tokenizer_fingerprint(tokenizer) -> str:
    """Changes when the ids or the chat layout of any text may change."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else dict(sorted(tokenizer.get_vocab().items()))
    for passing in ("truncation", "padding"):  # state that calls leave behind, not part of the tokenizer
        state.pop(passing, None)
    facts = [
        state,
        tokenizer.chat_template,
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        tokenizer.pad_token_id,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Encoder:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        # Documents may be longer than the model's positions (rows cut them), so that warning says nothing here.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.pad_id = next((i for i in (pad, eos) if i is not None), 0)
        self.has_template = bool(tokenizer.chat_template)
        self.chat = Chat(tokenizer)
        self.plain = PlainText(tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        return tokenizer_fingerprint(self.tokenizer)

    def encode(self, documents: list[Document]) -> Iterator[list[Encoded] | BadRecord]:
        """In order; plain texts are tokenised together, which is several times faster."""
        texts = [d.text for d in documents if d.text is not None]
        plain = iter(self._ids(texts) if texts else ())
        for document in documents:
            try:
                if document.text is not None:
                    yield [of_text(self.plain, document.text, next(plain))]
                else:
                    yield list(self._sequences(document))
            except BadConversation as error:
                yield BadRecord(document.id, str(error))

    def _sequences(self, document: Document) -> Iterator[Encoded]:
        if document.messages is not None:
            yield self._chat(document.messages)
        elif document.response is not None:
            yield self._answer(document.prompt, document.response, document.plain)
        else:
            for answer in (document.chosen, document.rejected):
                if isinstance(answer, str):
                    yield self._answer(document.prompt, answer)
                else:
                    yield self._chat([*_as_messages(document.prompt), *answer], last_only=True)

    def _answer(self, prompt: str | Messages, response: str, plain: bool = False) -> Encoded:
        if (self.has_template and not plain) or not isinstance(prompt, str):
            answer = {"role": "assistant", "content": response}
            return self._chat([*_as_messages(prompt), answer], last_only=True)
        # Tokenised apart, because at inference the prompt's tokens are fixed before there is an answer.
        given = list(self._ids([prompt])[0])
        eos = self.tokenizer.eos_token_id
        while given and given[-1] == eos and len(given) > 1:  # some tokenizers end every text with it
            given.pop()
        learned = self.plain.ended(self._ids([response], special=False)[0])
        roles = [CONTEXT] * len(given) + [TARGET] * len(learned)
        return Encoded([*given, *learned], roles, len(response.encode()))

    def _chat(self, messages: Messages, last_only: bool = False) -> Encoded:
        if not self.has_template:
            raise UserError("the data has conversations, but the tokenizer has no chat template")
        try:
            tokens, mask = self.chat.encode(messages)
        except (UserError, BadConversation):
            raise
        except Exception as error:  # templates raise what they like (jinja2.TemplateError and others)
            raise BadConversation(f"the chat template refuses it: {error}") from None
        if last_only:
            mask = _last_run(mask)
        if not any(mask):
            raise BadConversation("the chat template leaves no token of an assistant turn")
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        num_bytes = sum(len(a.encode()) for a in (answers[-1:] if last_only else answers))
        return Encoded(tokens, [TARGET if m else CONTEXT for m in mask], num_bytes)

    def _ids(self, texts: list[str], special: bool = True) -> list[Sequence[int]]:
        return self.plain.ids(texts, special) if self.plain.is_fast else through(self.tokenizer, texts, special)


def of_text(plain: PlainText, text: str, ids: Sequence[int]) -> Encoded:
    return Encoded(plain.ended(ids), None, len(text.encode()))


def _as_messages(prompt: str | Messages | None) -> Messages:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return prompt or []


def _last_run(mask: list[int]) -> list[int]:
    """Only the last run of ones of `mask`."""
    stop = len(mask)
    while stop and not mask[stop - 1]:
        stop -= 1
    start = stop
    while start and mask[start - 1]:
        start -= 1
    return [0] * start + [1] * (stop - start) + [0] * (len(mask) - stop)
