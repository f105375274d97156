"""Questions from ATT&CK: only about what is held out, without the answer in them, with wrong answers that are wrong."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from adapt.components import SourceChoice, sources
from adapt.config.decode import decode
from adapt.data.documents import Document
from adapt.data.sources.attack_questions import without
from adapt.errors import UserError

TACTICS = ("Execution", "Persistence")


def technique(number: int) -> Document:
    tactic, name = TACTICS[number % 2], f"Cunning Method {'ABCDEFGHIJKLMNOP'[number]}"
    mention = f"Unlike Cunning-Method {'ABCDEFGHIJKLMNOP'[number + 2]}, it is quiet. " if number == 0 else ""
    meta = {
        "kind": "technique",
        "attack_id": f"T{number:04d}",
        "name": name,
        "tactics": [tactic],
        "parent": "T0002" if number == 4 else None,
        "description": f"Adversaries may use {name.lower()}s (T{number:04d}) to do things. {mention}Number {number} helps.",
        "mitigations": [
            {"attack_id": f"M{number % 5}", "name": "x", "text": f"Advice {number % 5} against {name}: {number}."},
            {"attack_id": "M8", "name": "none", "text": "This cannot be easily mitigated with preventive controls."},
            {"attack_id": "M9", "name": "empty", "text": ""},
        ],
    }
    return Document(id=f"t{number}", text="...", meta=meta)


@dataclass(frozen=True, kw_only=True)
class MadeUpConfig:
    first: int = 0
    """First technique."""
    last: int = 13
    """Last one."""


class MadeUp:
    label, where, licence = "made-up", "made-up techniques", None

    def __init__(self, config: MadeUpConfig):
        self.config = config

    def fingerprint(self) -> str:
        return repr(self.config)

    def documents(self):
        yield Document(id="group", text="...", meta={"kind": "group", "name": "A", "tactics": ["Execution"]})
        for number in range(self.config.first, self.config.last + 1):
            yield technique(number)


def made_up(config: MadeUpConfig) -> MadeUp:
    return MadeUp(config)


NAME = f"{__name__}.made_up"


def source(**over):
    choice = {"name": "attack_questions", "source": {"name": NAME, "first": 0, "last": 7}, **over}
    return decode(choice, SourceChoice).build()


def questions(**over) -> list[Document]:
    return list(source(**over).documents())


ALL = {"distractors_from": {"name": NAME, "last": 13}, "distractors": 2}


def test_every_question_is_of_the_source_and_its_answer_right():
    found = questions(**ALL)
    by_id = {d.meta["attack_id"]: d for d in (technique(n) for n in range(14))}
    asked = {d.meta["attack_id"] for d in found}
    assert asked == {f"T{n:04d}" for n in range(8)}
    for question in found:
        of = by_id[question.meta["attack_id"]].meta
        if question.meta["part"] == "name":
            assert question.response == of["name"]
        else:
            assert question.response == of["mitigations"][0]["text"].replace(of["name"], "this technique")
            assert of["name"] in question.prompt


def test_the_answer_is_neither_in_the_question_nor_among_the_wrong_ones():
    for question in questions(**ALL):
        assert question.response.lower() not in question.prompt.lower()
        assert question.meta["attack_id"] not in question.prompt
        assert question.response not in question.meta["distractors"]
        assert len(set(question.meta["distractors"])) == 2


def test_wrong_names_are_of_the_same_tactic_unrelated_and_not_mentioned():
    tactic = {technique(n).meta["name"]: TACTICS[n % 2] for n in range(14)}
    seen = set()
    for seed in range(8):
        for question in questions(**ALL, kinds=["name"], seed=seed):
            wrong = question.meta["distractors"]
            assert {tactic[w] for w in wrong} == {tactic[question.response]}
            seen |= {(question.meta["attack_id"], w) for w in wrong}
    name = {n: technique(n).meta["name"] for n in range(14)}
    assert ("T0000", name[2]) not in seen  # its description mentions that one
    assert not {("T0002", name[4]), ("T0004", name[2])} & seen  # a technique and its sub-technique
    assert ("T0000", name[12]) in seen  # from the other documents


def test_wrong_mitigations_are_of_other_kinds():
    for question in questions(**ALL, kinds=["mitigation"]):
        own = int(question.meta["attack_id"][1:]) % 5
        assert not any("Cunning" in text for text in (question.response, *question.meta["distractors"]))
        assert all(f"Advice {own} " not in wrong for wrong in question.meta["distractors"])


def test_questions_repeat_and_the_seed_changes_them():
    assert questions(**ALL) == questions(**ALL) != questions(**ALL, seed=1)
    assert source(**ALL).fingerprint() != source(**ALL, seed=1).fingerprint()


def test_too_few_of_a_tactic_are_not_asked_about():
    assert questions(kinds=["name"], distractors=9) == []


def test_documents_without_the_facts_are_refused(tmp_path):
    (tmp_path / "x.txt").write_text("Text.")
    with pytest.raises(UserError, match="no document in it has the facts"):
        questions(source=f"text:{tmp_path / 'x.txt'}")


def test_names_are_removed_however_they_are_written():
    text = "Pass the Hash, pass-the-hash and PASS THE  HASHES."
    assert without("Pass the Hash", text) == "this technique, this technique and this technique."


def test_it_is_registered():
    assert "attack_questions" in sources.names()
