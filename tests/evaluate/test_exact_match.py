"""Numbers of answers: what counts as one, and what perfect, wrong and talkative decoders score."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from adapt.components import SourceChoice
from adapt.config import decode
from adapt.data.questions import Asker
from adapt.errors import UserError
from adapt.evaluate.answers import answer_nats
from adapt.evaluate.suites.exact_match import number
from tests import tiny
from tests.evaluate import oracle
from tests.evaluate.test_suites import context, suite

SHORT = [("What is 3*4?", "3*4 = <<3*4=12>>12\n#### 12"), ("And 1000+1?", "It is 1,001.\n#### 1,001")]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a in SHORT))
    return decode(f"jsonl:{path}", SourceChoice)


@pytest.mark.parametrize(
    ("text", "value"),
    (
        ("so 3 and 4.\n#### 1,200\nQ: 7", "1200"),
        ("#### $5.50 in all", "5.5"),
        ("first 3, then -4.", "-4"),
        ("it costs 12.", "12"),
        ("a .5 share", "0.5"),
        ("none", None),
        ("####", None),
    ),
)
def test_the_number_a_text_comes_to(text, value):
    assert number(text) == (None if value is None else Decimal(value))


def test_a_pattern_of_ones_own():
    assert number("answer: \\boxed{42}, not 7", r"boxed\{(\d+)\}") == 42
    assert number("answer 7", r"boxed\{(\d+)\}") is None


def test_decoders_that_know_guess_and_talk(monkeypatch, source):
    def knows(text):
        return next(a for q, a in SHORT if q in text)

    made = suite("exact_match", source=source, label="sums", max_new_tokens=60)
    oracle.install(monkeypatch, knows)
    results = made(context(None))
    assert results["exact_match/sums"] == 1
    assert list(results) == made.config.metrics(None, [])
    oracle.install(monkeypatch, lambda text: "#### 12")
    assert made(context(None))["exact_match/sums"] == 0.5
    oracle.install(monkeypatch, lambda text: knows(text).replace(",", "") + "<|im_end|>\nAnother one: #### 5")
    assert made(context(None))["exact_match/sums"] == 1
    oracle.install(monkeypatch, lambda text: "Hm.<|im_end|>" + knows(text))  # after the end of its turn
    assert made(context(None))["exact_match/sums"] == 0


def test_answer_loss_is_per_token_of_the_reference(source):
    asker = Asker(tiny.tiny_tokenizer())
    questions = [asker(q, a) for q, a in SHORT]
    nats = answer_nats(context(None), questions)
    results = suite("exact_match", source=source, max_new_tokens=4)(context(None))
    assert results["answer_loss/sums"] == pytest.approx(sum(nats) / sum(len(q.answer) for q in questions))


def test_made_up_problems_are_a_source(monkeypatch):
    oracle.install(monkeypatch, lambda text: "no idea")
    held_out = decode({"name": "arithmetic", "split": "held-out", "count": 3}, SourceChoice)
    results = suite("exact_match", source=held_out, max_new_tokens=2)(context(None))
    assert results["exact_match/arithmetic-held-out"] == 0
    assert results["answer_loss/arithmetic-held-out"] > 0


def test_answers_without_a_number_are_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"question": "Why?", "answer": "Because."}))
    with pytest.raises(UserError, match="no number"):
        suite("exact_match", source=decode(f"jsonl:{tmp_path / 'x.jsonl'}", SourceChoice))(context(None))


def test_texts_without_questions_are_refused(tmp_path):
    (tmp_path / "x.txt").write_text("Some text.")
    with pytest.raises(UserError, match="no record with a prompt"):
        suite("exact_match", source=decode(f"text:{tmp_path / 'x.txt'}", SourceChoice))(context(None))


@pytest.mark.parametrize("fields", ({"limit": 0}, {"max_new_tokens": 0}, {"pattern": "("}, {"pattern": r"\d+"}))
def test_bad_settings(source, fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        suite("exact_match", source=source, **fields)
