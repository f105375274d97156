"""A record (a JSON object, a Parquet row) -> Document, by the names of its fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapt.data.documents import BadRecord, Document, Messages
from adapt.errors import nearest

USUAL = {
    "text": ("text", "content"),
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("prompt", "question"),
    "response": ("response", "completion", "answer"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}
SHORT = 1000
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Names of the fields; null finds the usual ones, in the order chosen/rejected, messages, prompt/response, text."""

    text: str | None = None
    """Field with plain text (usual names: text, content)."""
    prompt: str | None = None
    """Field with the prompt: text, or a list of messages (usual names: prompt, question)."""
    response: str | None = None
    """Field with the answer to the prompt (usual names: response, completion, answer)."""
    messages: str | None = None
    """Field with a list of `{role, content}` (usual names: messages, conversations, conversation)."""
    chosen: str | None = None
    """Field with the preferred answer or conversation."""
    rejected: str | None = None
    """Field with the other one."""


def to_document(record: Any, fields: Fields, where: str, part: str) -> Document | BadRecord:
    if not isinstance(record, dict):
        return BadRecord(where, f"expected an object with fields, got {type(record).__name__}")
    try:
        form = _form(record, fields)
        return Document(id=where, meta={**_facts(record, form, fields), "part": part, **_distractors(record)}, **form)
    except _BadField as error:
        return BadRecord(where, str(error))


class _BadField(ValueError):
    pass


def _distractors(record: dict[str, Any]) -> dict[str, list[str]]:
    """The wrong answers of a multiple-choice question, where there are some."""
    found = record.get("distractors")
    texts = isinstance(found, list) and found and all(isinstance(x, str) for x in found)
    return {"distractors": found} if texts else {}


def _form(record: dict[str, Any], fields: Fields) -> dict[str, Any]:
    given = [name for name in USUAL if getattr(fields, name)]
    keys = {name: _key(record, fields, name, auto=not given) for name in USUAL}
    for name in given:
        if keys[name] is None:
            wanted = getattr(fields, name)
            raise _BadField(f"has no field {wanted!r}.{nearest(wanted, record)} It has: {', '.join(map(str, record))}")
    if keys["chosen"] and keys["rejected"]:
        return _pair(record, keys)
    if keys["messages"]:
        return {"messages": _messages(record[keys["messages"]], keys["messages"])}
    if keys["prompt"] and keys["response"]:
        response = _text(record, keys["response"])
        return {"prompt": _text_or_messages(record, keys["prompt"], answer=False), "response": response}
    if keys["text"]:
        return {"text": _text(record, keys["text"])}
    raise _BadField(
        "has none of: text; prompt and response; messages; chosen and rejected. "
        f"It has: {', '.join(map(str, record)) or 'nothing'}; name yours under `fields`"
    )


def _facts(record: dict[str, Any], form: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """Its other short values, which `document_weight` may speak of: numbers, true or false, text of up to 1,000
    characters."""
    own = {id(value) for value in form.values()}
    texts = {key for keys in USUAL.values() for key in keys} | {*filter(None, vars(fields).values())}
    return {
        str(key): value
        for key, value in record.items()
        if (isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= SHORT))
        and not (key in texts and id(value) in own)
    }


def _pair(record: dict[str, Any], keys: dict[str, str | None]) -> dict[str, Any]:
    chosen = _text_or_messages(record, keys["chosen"], answer=True)
    rejected = _text_or_messages(record, keys["rejected"], answer=True)
    prompt = _text_or_messages(record, keys["prompt"], answer=False) if keys["prompt"] else None
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise _BadField("one of chosen and rejected is text, the other a conversation")
    if isinstance(chosen, str) and prompt is None:
        raise _BadField("chosen and rejected are text, so a prompt is needed")
    inside = [prompt is not None and _holds(conversation, prompt) for conversation in (chosen, rejected)]
    if all(inside):
        prompt = None  # stated once more beside the conversations, which is how most Hub data sets of pairs are
    elif any(inside):
        raise _BadField("one of chosen and rejected begins with the prompt, the other does not")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _holds(conversation: str | Messages, prompt: str | Messages) -> bool:
    """Whether a conversation has the prompt in it: its messages at the beginning, or its text as a turn of the user's."""
    if isinstance(conversation, str):
        return False
    if isinstance(prompt, str):
        return any(m["role"] == "user" and m["content"].strip() == prompt.strip() for m in conversation)
    return conversation[: len(prompt)] == prompt


def _key(record: dict[str, Any], fields: Fields, name: str, auto: bool) -> str | None:
    wanted = getattr(fields, name)
    if wanted:
        return wanted if wanted in record else None
    if not auto and name != "prompt":  # `prompt` may go with a named `chosen`, `rejected` or `response`
        return None
    return next((key for key in USUAL[name] if record.get(key) is not None), None)


def _text(record: dict[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise _BadField(f"field {key!r} should be text, not {type(value).__name__}")
    _no_surrogates(value, key)
    return value


def _text_or_messages(record: dict[str, Any], key: str | None, answer: bool) -> str | Messages:
    assert key is not None
    value = record[key]
    return _text(record, key) if isinstance(value, str) else _messages(value, key, answer)


def _messages(value: Any, key: str, answer: bool = True) -> Messages:
    if value is None or isinstance(value, str | bytes | dict) or not hasattr(value, "__iter__"):
        raise _BadField(f"field {key!r} should be a list of messages, not {type(value).__name__}")
    messages = [_message(m, f"{key}[{i}]") for i, m in enumerate(value)]
    if not messages:
        raise _BadField(f"field {key!r} is an empty conversation")
    if answer and not any(m["role"] == "assistant" for m in messages):
        raise _BadField(f"field {key!r} has no assistant turn, so there is nothing to learn from it")
    return messages


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _BadField(f"{where} should be an object with role and content, not {type(value).__name__}")
    if "role" not in value and "from" in value and "value" in value:
        value = {"role": SHAREGPT_ROLES.get(value["from"], value["from"]), "content": value["value"]}
    for name in ("role", "content"):
        if not isinstance(value.get(name), str):
            raise _BadField(f"{where} should have {name!r} as text, got {value.get(name)!r}")
        _no_surrogates(value[name], where)
    return {"role": value["role"], "content": value["content"]}


def _no_surrogates(text: str, key: str) -> None:
    try:  # JSON may escape half a surrogate pair, which is no text and which no tokenizer accepts
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadField(f"field {key!r} has half a surrogate pair at character {error.start}") from None
