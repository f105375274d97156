"""Conversations -> token ids, with the answers marked.

What a message says is text: an answer that quotes `<|im_end|>` does not end there, and one that quotes the mask token
does not contain it. Only what the chat template itself writes is parsed for special tokens. So the special tokens that
messages quote are hidden from the template behind markers, and a text that has any is tokenised by a twin of the
tokenizer whose special tokens go by private names: the template's are renamed, the quoted ones stay words.
"""

from __future__ import annotations

import copy
import json
import re
from functools import cached_property

from adapt.data.documents import Messages
from adapt.errors import UserError

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
QUOTED, OWN, END = "\ue0f0", "\ue0f1", "\ue0f2"
"""Private-use characters around the number of a special token: one that a message quotes, one of the template's."""
PRIVATE = re.compile(f"[{QUOTED}{OWN}{END}]")

Span = tuple[int, int]


class BadConversation(ValueError):
    """This one cannot be used; the message says why."""


class Chat:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.template = str(tokenizer.chat_template or "")
        self.has_tags = bool(GENERATION_TAG.search(self.template))
        added = tokenizer.added_tokens_decoder
        self.special = {t.content: i for i, t in added.items() if t.special and t.content}
        longest_first = sorted(self.special, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, messages: Messages) -> tuple[list[int], list[int]]:
        """Token ids, and 1 for each token of an assistant's turn (its end included)."""
        if any(PRIVATE.search(s) for m in messages for s in m.values()):
            raise BadConversation("has private-use characters (U+E0F0 to U+E0F2), which are needed to mark text")
        quoting = [{k: self.pattern.sub(self._marker, v) for k, v in m.items()} for m in messages]
        text, spans = self._tagged(quoting) if self.has_tags else self._by_prefixes(quoting)
        tokenizer = self.tokenizer
        if quoting != messages:
            tokenizer = self._twin
            text, spans = self._renamed(text, spans)
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = [int(any(a < stop and start < b for a, b in spans)) for start, stop in out["offset_mapping"]]
        return out["input_ids"], mask

    def _marker(self, match: re.Match) -> str:
        return f"{QUOTED}{self.special[match[0]]}{END}"

    def _tagged(self, messages: Messages) -> tuple[str, list[Span]]:
        """The template marks the assistant's text itself."""
        from transformers.utils.chat_template_utils import render_jinja_template

        (text,), (spans,) = render_jinja_template(
            conversations=[messages],
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return text, [(start, stop) for start, stop in spans]

    def _by_prefixes(self, messages: Messages) -> tuple[str, list[Span]]:
        """An answer is what a conversation's text has more than its text up to the assistant's header."""
        render = self.tokenizer.apply_chat_template
        whole = render(messages, tokenize=False)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if i == 0:
                raise BadConversation("begins with the assistant: there is nothing to answer")
            before = render(messages[:i], tokenize=False, add_generation_prompt=True)
            after = render(messages[: i + 1], tokenize=False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise UserError(
                    "the tokenizer's chat template writes earlier turns differently once later ones follow, so the "
                    "answers cannot be located; give it a template with {% generation %} ... {% endgeneration %}"
                )
            spans.append((len(before), len(after.rstrip())))
        return whole, spans

    def _renamed(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """The template's special tokens by their private names, the quoted ones as they were; spans follow."""
        by_id = {index: name for name, index in self.special.items()}
        marks = re.compile(f"{QUOTED}(\\d+){END}|{self.pattern.pattern}")

        def renamed(text: str) -> str:
            return marks.sub(lambda m: by_id[int(m[1])] if m[1] else _private(self.special[m[0]]), text)

        return renamed(text), [(len(renamed(text[:start])), len(renamed(text[:stop]))) for start, stop in spans]

    @cached_property
    def _twin(self):
        """The same tokenizer, its special tokens by private names."""
        from tokenizers import Tokenizer

        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        names = {name: _private(index) for name, index in self.special.items()}
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = state["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {names.get(token, token): index for token, index in model["vocab"].items()}
        elif isinstance(model.get("vocab"), list):
            model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        state["post_processor"] = None  # no special token is added around a rendered conversation
        twin = copy.deepcopy(self.tokenizer)
        twin._tokenizer = Tokenizer.from_str(json.dumps(state))
        if any(twin._tokenizer.token_to_id(_private(index)) != index for index in self.special.values()):
            raise BadConversation("quotes a special token, which this tokenizer cannot be kept from parsing")
        return twin


def _private(index: int) -> str:
    return f"{OWN}{index}{END}"
