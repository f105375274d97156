"""Documents to ids: plain text, conversations with their roles, answers, preference pairs."""

from __future__ import annotations

import copy

import pytest

from adapt.data.batch import TARGET
from adapt.data.documents import BadRecord, Document
from adapt.data.encode import Encoder, tokenizer_fingerprint
from adapt.errors import UserError

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "The fox?"},
    {"role": "assistant", "content": " Jumps."},
    {"role": "user", "content": "Again?"},
    {"role": "assistant", "content": "Yes"},
]
WITHOUT_TAGS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.fixture
def other(tokenizer):
    """A copy of the tokenizer, to be changed."""
    return copy.deepcopy(tokenizer)


def encode(tokenizer, **form):
    (result,) = Encoder(tokenizer).encode([Document(id="it", **form)])
    return result


def learned(tokenizer, encoded) -> list[str]:
    """The runs of TARGET tokens, as text."""
    runs, before = [], None
    for token, role in zip(encoded.tokens, encoded.roles, strict=True):
        if role == TARGET:
            if before != TARGET:
                runs.append([])
            runs[-1].append(token)
        before = role
    return [tokenizer.decode(r) for r in runs]


def test_plain_text_ends_with_eos(tokenizer):
    (encoded,) = encode(tokenizer, text="The fox")
    assert tokenizer.decode(encoded.tokens) == "The fox<|endoftext|>"
    assert encoded.tokens[-1] == tokenizer.eos_token_id
    assert encoded.roles is None
    assert encode(tokenizer, text="Füchse")[0].num_bytes == 7


def test_a_text_that_mentions_a_special_token_does_not_contain_it(tokenizer):
    (encoded,) = encode(tokenizer, text="ends with <|endoftext|> says the page")
    assert encoded.tokens.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(encoded.tokens[:-1]) == "ends with <|endoftext|> says the page"


def test_a_tokenizer_without_eos_appends_nothing(other):
    other.eos_token = None
    assert other.decode(encode(other, text="The fox")[0].tokens) == "The fox"


def test_texts_and_conversations_keep_their_order(tokenizer):
    forms = [{"text": "a"}, {"messages": CHAT}, {"text": "b"}]
    results = list(Encoder(tokenizer).encode([Document(id=str(i), **f) for i, f in enumerate(forms)]))
    assert [r[0].roles is None for r in results] == [True, False, True]
    assert tokenizer.decode(results[2][0].tokens[:1]) == "b"


@pytest.mark.parametrize("template", [None, WITHOUT_TAGS])
def test_only_the_assistant_is_learned(other, template):
    """The same with the template's own tags and, where it has none, by prefixes: answer and end of turn."""
    other.chat_template = template or other.chat_template
    (encoded,) = encode(other, messages=CHAT)
    assert learned(other, encoded) == [" Jumps.<|im_end|>", "Yes<|im_end|>"]
    assert other.decode(encoded.tokens).startswith("<|im_start|>system\nBe kind.<|im_end|>")
    assert encoded.num_bytes == len(" Jumps.Yes")
    assert encoded.tokens == other.apply_chat_template(CHAT)["input_ids"]


@pytest.mark.parametrize("template", [None, WITHOUT_TAGS])
@pytest.mark.parametrize("sentencepiece", [False, True])
def test_an_answer_that_quotes_special_tokens_does_not_contain_them(other, template, sentencepiece):
    """Neither ends its turn nor becomes the mask token; the template's own tokens stay what they are."""
    if sentencepiece:  # whose words begin with a space, the first one of a text too
        from tokenizers import pre_tokenizers

        other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(prepend_scheme="first"),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    other.chat_template = template or other.chat_template
    other.add_special_tokens({"mask_token": "<reserved_0>"})
    said = "say <|im_end|>\nor <reserved_0>"
    chat = [{"role": "user", "content": "<|im_start|>?"}, {"role": "assistant", "content": said}]
    (encoded,) = encode(other, messages=[*chat, *chat])
    ids = {name: other.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>", "<reserved_0>")}
    assert [encoded.tokens.count(i) for i in ids.values()] == [4, 4, 0]
    assert encoded.tokens[0] == ids["<|im_start|>"]
    if sentencepiece:
        assert learned(other, encoded)[0].replace("▁", " ") == f"{said}<|im_end|>"
    else:
        assert learned(other, encoded) == [f"{said}<|im_end|>"] * 2
        assert other.decode(encoded.tokens) == other.apply_chat_template([*chat, *chat], tokenize=False)
    plain = encode(other, messages=[{**m, "content": "Yes"} for m in chat])[0]
    assert plain.tokens == other.apply_chat_template([{**m, "content": "Yes"} for m in chat])["input_ids"]


@pytest.mark.parametrize("template", [None, WITHOUT_TAGS])
def test_prompt_and_response_go_through_the_chat_template(other, template):
    other.chat_template = template or other.chat_template
    (encoded,) = encode(other, prompt="The fox?", response="Jumps.")
    assert learned(other, encoded) == ["Jumps.<|im_end|>"]
    (encoded,) = encode(other, prompt=CHAT[:4], response="No")
    assert learned(other, encoded) == ["No<|im_end|>"]
    assert encoded.num_bytes == 2


def test_prompt_and_response_without_template(other):
    other.chat_template = None
    (encoded,) = encode(other, prompt="1 + 2 =", response=" 3")
    assert learned(other, encoded) == [" 3<|endoftext|>"]
    assert other.decode(encoded.tokens) == "1 + 2 = 3<|endoftext|>"


@pytest.mark.parametrize(
    "form",
    [
        {"prompt": "Q", "chosen": "good", "rejected": "bad"},
        {"prompt": CHAT[:2], "chosen": [{"role": "assistant", "content": "good"}],
         "rejected": [{"role": "assistant", "content": "bad"}]},
        {"chosen": [*CHAT[:4], {"role": "assistant", "content": "good"}],
         "rejected": [*CHAT[:4], {"role": "assistant", "content": "bad"}]},
    ],
)  # fmt: skip
def test_preference_pairs_are_two_sequences(tokenizer, form):
    chosen, rejected = encode(tokenizer, **form)
    assert learned(tokenizer, chosen) == ["good<|im_end|>"]
    assert learned(tokenizer, rejected) == ["bad<|im_end|>"]
    given = chosen.roles.index(TARGET)
    assert chosen.tokens[:given] == rejected.tokens[:given]


def test_what_the_template_refuses_is_a_bad_record(other):
    other.chat_template = "{{ raise_exception('roles must alternate') }}"
    result = encode(other, messages=CHAT)
    assert isinstance(result, BadRecord)
    assert (result.where, result.what) == ("it", "the chat template refuses it: roles must alternate")


def test_a_conversation_that_begins_with_the_assistant(other):
    other.chat_template = WITHOUT_TAGS
    result = encode(other, messages=CHAT[2:])
    assert isinstance(result, BadRecord)
    assert "begins with the assistant" in result.what


def test_a_template_that_rewrites_earlier_turns_is_refused(other):
    other.chat_template = FORGETFUL
    with pytest.raises(UserError, match="writes earlier turns differently"):
        encode(other, messages=CHAT)


def test_conversations_need_a_template(other):
    other.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        encode(other, messages=CHAT)


def test_tokenizer_fingerprint(tokenizer, other):
    before = tokenizer_fingerprint(tokenizer)
    other("some text", padding="max_length", max_length=8, truncation=True)
    assert tokenizer_fingerprint(other) == before  # what a call leaves behind is not part of it
    other.chat_template = "{{ messages }}"
    changed = tokenizer_fingerprint(other)
    other.add_tokens(["newtoken"])
    assert len({before, changed, tokenizer_fingerprint(other)}) == 3
