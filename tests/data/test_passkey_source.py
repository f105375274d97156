"""Passkey texts to train on."""

from __future__ import annotations

from adapt.components import SourceChoice
from adapt.config.decode import decode
from adapt.data.batch import CONTEXT, TARGET
from adapt.data.needles import HELD_OUT_FROM
from adapt.data.prepare import prepare
from tests import tiny
from tests.data.helpers import recipe


def source(**over):
    built = decode({"name": "passkey", "length": 300, "count": 12, **over}, SourceChoice).build()
    built.use_tokenizer(tiny.tiny_tokenizer())
    return built


def test_documents_repeat_and_keys_are_of_the_split():
    one, two = (list(source().documents()) for _ in range(2))
    assert one == two
    assert len({d.prompt for d in one}) == 12
    assert all(d.meta["key"] < HELD_OUT_FROM for d in one)
    assert all(d.meta["key"] >= HELD_OUT_FROM for d in source(split="held-out").documents())
    assert [d.response for d in source(seed=1).documents()] != [d.response for d in one]
    assert source(seed=1).fingerprint() != source().fingerprint()


def test_a_row_is_one_document_and_only_the_key_is_learned(tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    train = [{"source": {"name": "passkey", "length": 300, "count": 12}}]
    (shards,) = prepare(recipe(train, seq_len=300, cache=str(tmp_path)), tokenizer).train
    assert (shards.num_documents, shards.num_tokens) == (12, 12 * 300)
    roles = shards.roles(0, 300)
    learned = [t for t, r in zip(shards.tokens(0, 300).tolist(), roles.tolist(), strict=True) if r == TARGET]
    text = tokenizer.decode(learned, skip_special_tokens=True)
    assert len(text) == 5
    assert text.isdigit()
    assert roles[0] == CONTEXT


def test_texts_longer_than_a_row_are_refused():
    choice = decode({"name": "passkey", "length": 300}, SourceChoice)
    (problem,) = choice.config.problems(recipe([{"source": "passkey"}], seq_len=299))
    assert "300 tokens are cut by rows of data.seq_len=299" in problem.what
    assert not list(choice.config.problems(recipe([{"source": "passkey"}], seq_len=300)))


def test_plain_rows_are_what_the_suite_asks_plainly(tmp_path):
    """No turns, though the tokenizer has a chat template; the same tokens as a question of the suite and its answer."""
    from adapt.data.questions import Asker

    tokenizer = tiny.tiny_tokenizer()
    assert tokenizer.chat_template
    train = [{"source": {"name": "passkey", "length": 300, "count": 1, "prompt": "plain"}}]
    (shards,) = prepare(recipe(train, seq_len=300, cache=str(tmp_path)), tokenizer).train
    (document,) = source(count=1, prompt="plain").documents()
    question = Asker(tokenizer, plain=True)(document.prompt, document.response)
    row = shards.tokens(0, 300).tolist()
    assert row[: len(question.prompt) + len(question.answer)] == [*question.prompt, *question.answer]
    assert "<|im_start|>" not in tokenizer.decode(row)
