"""No training document shares a passage with what is measured on."""

from __future__ import annotations

import logging
import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.components import SuiteChoice
from adapt.config.decode import decode
from adapt.data import ngrams as ngrams_module
from adapt.data import plain_text
from adapt.data.dedup import EXACT, NEAR, minhash, normal_pieces, normalised, text_hash
from adapt.data.documents import Document
from adapt.data.ngrams import Filter, ngrams, word_hashes, words
from adapt.data.prepare import prepare
from adapt.errors import UserError
from tests.data.helpers import recipe, text_of, write_jsonl
from tests.recipes import WORDS

VOCABULARY = [f"{a}{b}" for a in WORDS for b in WORDS]


def page(seed: int, count: int = 80) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=count)


def prepared(tmp_path, tokenizer, train: list[str], held_out: dict[str, list[str]], suites=(), **data):
    def entry(name, texts):
        return {
            "source": f"jsonl:{write_jsonl(tmp_path / f'{name}.jsonl', [{'text': t} for t in texts])}",
            "name": name,
        }

    made = recipe(
        [entry("train", train)],
        [entry(name, texts) for name, texts in held_out.items()],
        **{"cache": str(tmp_path / "cache"), **data},
    )
    evaluation = type(
        "Evaluation", (), {"suites": tuple(decode(s, SuiteChoice) for s in suites)}
    )  # the only part that is read
    import dataclasses

    return prepare(dataclasses.replace(made, evaluation=evaluation), tokenizer, progress=False)


def dropped(shards) -> dict[str, int]:
    return {reason: n for step in shards.manifest["steps"] for reason, n in step["dropped"].items()}


def test_invariant_14_planted_duplicates_and_eval_passages_are_removed(tmp_path, tokenizer, caplog):
    """Exact and near duplicates, and passages of held-out data, whatever stands around them."""
    caplog.set_level(logging.WARNING, "adapt.data")
    own, other, secret = page(0, 200), page(1, 200), page(2, 60)
    train = [
        " ".join(own),
        " ".join(own).upper(),  # exact, but for case
        " ".join([*own[:100], "suddenly", *own[101:]]),  # near
        " ".join([*other[:50], *secret[20:33], *other[50:]]),  # 13 words of a held-out page
        " ".join([*other[60:90], *secret[40:52], *other[90:]]),  # 12: not enough
        " ".join(other[:50]) + " " + ", ".join(f"({w})" for w in secret[5:18]).title(),  # other case and punctuation
    ]
    shards = prepared(tmp_path, tokenizer, train, {"a": [" ".join(page(3))], "b": [" ".join(secret)]}, near_dedup=0.8)
    assert text_of(tokenizer, shards.train[0]) == [f"{train[i]}<|endoftext|>" for i in (0, 4)]
    assert dropped(shards.train[0]) == {EXACT: 1, NEAR: 1, "13-gram also in held-out data (b)": 2}
    assert "train: 2 of 6 documents dropped: 13-gram also in held-out data (b)" in caplog.text


def test_short_held_out_documents_are_compared_whole(tmp_path, tokenizer):
    question = "What is the capital of Mali?"
    train = [question.lower(), f"They asked: {question} He knew.", "something else"]
    shards = prepared(tmp_path, tokenizer, train, {"quiz": [question]}, exact_dedup=False)
    assert text_of(tokenizer, shards.train[0]) == [f"{t}<|endoftext|>" for t in train[1:]]


def test_what_suites_ask_is_compared_too(tmp_path, tokenizer):
    secret = page(2, 60)
    path = write_jsonl(tmp_path / "quiz.jsonl", [{"prompt": " ".join(secret), "response": "yes"}])
    suite = {"name": "tests.data.steps.quiz", "source": f"jsonl:{path}"}
    train = [" ".join(page(1)), " ".join(secret[10:40])]
    shards = prepared(tmp_path, tokenizer, train, {}, [suite])
    assert dropped(shards.train[0]) == {"13-gram also in held-out data (quiz)": 1}
    assert shards.train[0].num_documents == 1
    off = prepared(tmp_path, tokenizer, train, {}, [suite], decontaminate=None)
    assert off.train[0].num_documents == 2
    path.unlink()
    with pytest.raises(UserError, match=r"evaluation.suites\[0\].source: .*quiz.jsonl: there is no such file"):
        prepared(tmp_path, tokenizer, train, {}, [suite])


def test_another_length_is_another_preparation(tmp_path, tokenizer):
    secret = page(2, 60)
    train = [" ".join([*page(1), *secret[:8], *page(4)]), "other"]
    held_out = {"a": [" ".join(secret)]}
    assert prepared(tmp_path, tokenizer, train, held_out).train[0].num_documents == 2
    assert prepared(tmp_path, tokenizer, train, held_out, decontaminate=8).train[0].num_documents == 1


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=9), max_size=6), st.integers(2, 5), st.integers(1, 30))
def test_ngrams_are_those_of_each_document_alone(documents, n, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams_module, "BLOCK", block)
        found = list(ngrams([word_hashes(" ".join(d)) for d in documents], n))
    hashes, owner = (np.concatenate(x) if x else np.empty(0) for x in (list(zip(*found, strict=True)) or [[], []]))
    named: dict[tuple, int] = {}
    for i, document in enumerate(documents):
        runs = [tuple(document[k : k + n]) for k in range(len(document) - n + 1)] or [tuple(document)]
        expected = [r for r in runs if r]
        own = hashes[owner == i].tolist()
        assert len(own) == len(expected)
        for run, value in zip(expected, own, strict=True):
            assert named.setdefault(run, value) == value
    assert len(set(named.values())) == len(named)


@given(st.text(alphabet="aÄ\u0308 \n", max_size=60), st.integers(3, 20))
def test_a_long_text_is_normalised_as_a_short_one(text, size):
    spaced = " ".join(text.split())
    whole = Document(id="x", text=text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_text, "PIECE", size)
        found = normalised(whole)
        parts = list(normal_pieces(whole))
    if max(map(len, spaced.split()), default=0) < size:  # else a word may be cut between a letter and its accent
        assert found == normalised(whole)
    assert text_hash(*parts) == text_hash(found)
    assert len(word_hashes(*parts)) >= len(word_hashes(found))


def test_the_signature_of_a_long_text_is_that_of_the_whole():
    text = " ".join(page(5, 400))
    cut = text.index(" ", 1000)
    assert minhash(text[:cut], text[cut:]).tolist() == minhash(text).tolist()


@given(st.text())
def test_words_of_any_text(text):
    assert words(text) == [w.encode() for w in re.findall(r"\w+", text)]


def test_the_filter_finds_exactly_what_is_in_its_table():
    rng = np.random.default_rng(0)
    table = np.unique(rng.integers(0, 2**64, 5000, np.uint64))
    asked = np.concatenate([table[::3], rng.integers(0, 2**64, 5000, np.uint64)])
    assert Filter(table)(asked).tolist() == np.isin(asked, table).tolist()
    assert not Filter(table[:0])(asked).any()
