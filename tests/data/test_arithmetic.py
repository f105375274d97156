"""Word problems: right, repeatable, and never on both sides of the split."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from adapt.components import SourceChoice
from adapt.config.decode import decode
from adapt.data.word_problems import TEMPLATES
from adapt.errors import UserError

CALCULATION = re.compile(r"(\S+) = <<([^=>]+)=(\d+)>>(\d+)")


def documents(**over):
    return list(decode({"name": "arithmetic", "count": 600, **over}, SourceChoice).build().documents())


@pytest.fixture(scope="module")
def made():
    return documents()


def test_every_calculation_is_right_and_the_last_is_the_answer(made):
    for document in made:
        *steps, last = document.response.split("\n")
        assert 2 <= len(steps) <= 5
        for step in steps:
            (shown, expression, value, written), *more = CALCULATION.findall(step)
            assert not more
            assert shown == expression
            assert eval(expression) == int(value) == int(written) > 0
        assert last == f"#### {value}"
        assert document.meta["answer"] == int(value)


def test_steps_only_use_numbers_of_the_question_and_of_earlier_steps(made):
    for document in made:
        known = set(re.findall(r"\d+", document.prompt)) | {"2", "3", "100"}
        for step in document.response.split("\n")[:-1]:
            ((_, expression, value, _),) = CALCULATION.findall(step)
            assert set(re.findall(r"\d+", expression)) <= known
            known.add(value)


def test_no_placeholder_is_left_and_names_differ(made):
    assert not any(set("{}") & set(d.prompt + d.response) for d in made)
    assert len({d.prompt for d in made}) > 590


def test_there_are_many_kinds_and_all_are_used(made):
    assert len(TEMPLATES) >= 25
    parts = Counter(d.meta["part"] for d in made)
    assert len(parts) == len(TEMPLATES)
    assert {len(t.steps) for t in TEMPLATES} >= {2, 3, 4, 5}


def test_a_problem_is_a_function_of_seed_and_number(made):
    assert made[:50] == documents(count=50)
    assert documents(count=50, seed=1) != made[:50]


def key(document):
    return document.meta["part"], tuple(re.findall(r"\d+", document.prompt))


def test_splits_share_no_problem_whatever_the_seeds(made):
    held_out = documents(split="held-out", seed=5)
    assert not {key(d) for d in made} & {key(d) for d in held_out}
    assert len({d.meta["part"] for d in held_out}) == len(TEMPLATES)


def test_whole_templates_can_be_held_out():
    train, held_out = (
        {d.meta["part"] for d in documents(split=s, held_out_templates=5)} for s in ("train", "held-out")
    )
    assert not train & held_out
    assert (len(train), len(held_out)) == (len(TEMPLATES) - 5, 5)


@pytest.mark.parametrize("fields", ({"count": 0}, {"held_out": 1.0}, {"held_out_templates": 99}))
def test_bad_settings(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        documents(**fields)


def test_pairs_are_the_same_problems_with_a_calculation_gone_wrong(made):
    """One calculation in the rejected answer is wrong, all others are right, and so is none of the final answers."""
    for document, pair in zip(made, documents(pairs=True), strict=True):
        assert (pair.prompt, pair.chosen) == (document.prompt, document.response)
        *steps, last = pair.rejected.split("\n")
        found = [CALCULATION.findall(step)[0] for step in steps]
        wrong = [value for shown, expression, value, _ in found if eval(expression) != int(value)]
        assert len(wrong) == 1
        assert all(shown == expression and value == written for shown, expression, value, written in found)
        assert last == f"#### {found[-1][2]}" != f"#### {document.meta['answer']}"
        assert int(found[-1][2]) > 0
