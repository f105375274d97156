"""Needles: scoring with a perfect, a forgetful and a real decoder."""

from __future__ import annotations

import re

import pytest

from adapt.components import SourceChoice, SuiteChoice
from adapt.config import decode
from adapt.errors import UserError
from tests import tiny
from tests.evaluate import oracle
from tests.evaluate.test_suites import context, suite

SMALL = {"lengths": (450, 500), "depths": 2, "trials": 1, "new_tokens": 30}
NEEDLE = re.compile(r"One of the special magic (?:number|uuid)s for ([\w-]+) is: ([\w-]+)\.")
ESSAY = "It was a long day. Nobody had seen the harbour so empty! Why had they come? The boats lay still. "


def read(text: str) -> str:
    """Every value that the question asks for."""
    question = text[text.rindex("What ") :]
    return " and ".join(value for key, value in NEEDLE.findall(text) if key in question)


@pytest.fixture
def essays(tmp_path):
    (tmp_path / "essay.txt").write_text(ESSAY * 20)
    return decode(f"text:{tmp_path / 'essay.txt'}", SourceChoice)


@pytest.mark.parametrize("task", (1, 2, 3))
def test_a_decoder_that_reads_scores_one(monkeypatch, essays, task):
    seen = oracle.install(monkeypatch, read)
    grids = []
    fields = {**SMALL, "task": task, "new_tokens": 60} | ({} if task == 1 else {"essays": essays})
    made = suite("niah", **fields)
    results = made(context(None, keep=grids.append))
    assert results[f"niah_{task}/450"] == results[f"niah_{task}"] == 1
    assert grids[0].cells == ((1.0, 1.0), (1.0, 1.0))
    assert list(results) == made.config.metrics(None, [])
    texts = [tiny.tiny_tokenizer().decode(prompt) for prompt in seen]
    assert all(len(NEEDLE.findall(text)) == 1 for text in texts)
    assert all(("grass" in text) == (task == 1) and ("harbour" in text) == (task != 1) for text in texts)
    for prompt, length in zip(sorted(seen, key=len), (450, 450, 500, 500), strict=True):
        assert length - 60 - 30 < len(prompt) <= length - 60


def test_the_value_may_stand_anywhere_but_before_the_end(monkeypatch):
    oracle.install(monkeypatch, lambda text: "Well: " + read(text))
    assert suite("niah", **SMALL)(context(None))["niah_1"] == 1
    oracle.install(monkeypatch, lambda text: "No.<|endoftext|>" + read(text))
    assert suite("niah", **SMALL)(context(None))["niah_1"] == 0


@pytest.mark.parametrize(("ask", "score"), (("one", 1.0), ("all", 1.0)))
def test_all_needles_asked_for_are_found(monkeypatch, ask, score):
    oracle.install(monkeypatch, read)
    grids = []
    results = suite("multi_needle", ask=ask, needles=3, **SMALL)(context(None, keep=grids.append))
    assert results[f"multi_needle_{ask}"] == results[f"multi_needle_{ask}/500"] == score
    assert all(cell in (None, 1.0) for row in grids[0].cells for cell in row)


def test_each_value_counts_for_itself(monkeypatch):
    oracle.install(monkeypatch, lambda text: read(text).split(" and ")[0])
    assert suite("multi_needle", ask="all", needles=2, **SMALL)(context(None))["multi_needle_all"] == 0.5


def test_another_needle_is_no_answer(monkeypatch):
    def other(text):
        question = text[text.rindex("What ") :]
        return next(value for key, value in NEEDLE.findall(text) if key not in question)

    oracle.install(monkeypatch, other)
    assert suite("multi_needle", ask="one", needles=3, **SMALL)(context(None))["multi_needle_one"] == 0


def test_held_out_rows_are_essays_where_none_are_named(monkeypatch):
    oracle.install(monkeypatch, read)
    assert suite("niah", task=2, **SMALL)(context(None))["niah_2"] == 1
    with pytest.raises(UserError, match="no held-out data to take"):
        suite("niah", task=2, **SMALL)(context(None, eval_sets={}))


@pytest.mark.parametrize(
    ("choice", "letter"),
    (
        ({"name": "niah", "task": 2}, "needs a haystack"),
        ({"name": "niah", "essays": "text:gone.txt"}, "leave `essays` out"),
        ({"name": "niah", "task": 3, "essays": "text:gone.txt"}, "gone.txt"),
        ({"name": "multi_needle", "haystack": "essays"}, "needs a haystack"),
        ({"name": "niah", "lengths": [9000]}, "context is 8,192"),
    ),
)
def test_what_cannot_work_is_said_beforehand(choice, letter):
    from dataclasses import replace

    from adapt.config import load

    recipe = load("nbdiff").recipe
    recipe = replace(recipe, data=replace(recipe.data, eval=()))
    found = list(decode(choice, SuiteChoice).config.problems(recipe))
    assert any(letter in p.what or letter in p.where for p in found), found


@pytest.mark.parametrize("fields", ({"lengths": (100,)}, {"new_tokens": 0}, {"needles": 1}))
def test_bad_settings(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        suite("multi_needle", **fields)
