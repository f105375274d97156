"""The most probable answer, by hand and by suite."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from adapt.components import SourceChoice
from adapt.config import decode
from adapt.errors import UserError
from adapt.evaluate.suites.multiple_choice import first_is_best
from tests import tiny
from tests.evaluate.test_suites import context, suite

ASKED = [
    {"prompt": "The dog is", "response": " lazy", "distractors": [" a very quick brown fox", " 7"]},
    {"prompt": "Documents are", "response": " packed one after the other", "distractors": [" not", " grown"]},
    {"prompt": "Blocks grow from", "response": " one", "distractors": [" two to three", " none"]},
    {"prompt": "2 + 2 =", "response": " 4", "distractors": [" 5", " 22", " 4."]},
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, ASKED)))
    return decode(f"jsonl:{path}", SourceChoice)


def nats(model, tokenizer, prompt: str, answer: str) -> tuple[float, int]:
    """Brute force: one sequence at a time, in the training layout."""
    turns = [{"role": "user", "content": prompt}]
    given = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    given = tokenizer(given, add_special_tokens=False)["input_ids"]
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logp = model(torch.tensor([given + ids])).logits[0].log_softmax(-1)
    return -sum(float(logp[len(given) + i - 1, t]) for i, t in enumerate(ids)), len(ids)


def test_accuracies_are_those_of_brute_force(source, caplog):
    model, tokenizer = tiny.tiny_model("qwen3", dtype=torch.float64), tiny.tiny_tokenizer()
    right = {"": 0, "/token": 0, "/sum": 0}
    for record in ASKED:
        texts = [record["response"], *record["distractors"]]
        found = [nats(model, tokenizer, record["prompt"], t) for t in texts]
        right["/sum"] += first_is_best([n for n, _ in found])
        right["/token"] += first_is_best([n / count for n, count in found])
        right[""] += first_is_best([n / len(t.encode()) for (n, _), t in zip(found, texts, strict=True)])
    made = suite("multiple_choice", source=source)
    with caplog.at_level(logging.INFO, "adapt.evaluate"):
        results = made(context(None))
    assert results == {f"multiple_choice/asked{k}": v / len(ASKED) for k, v in right.items()}
    assert list(results) == made.config.metrics(None, [])
    assert "4 questions" in caplog.text
    assert "standard error" in caplog.text


def test_a_tie_is_no_answer():
    assert first_is_best([1.0, 2.0]) == 1
    assert first_is_best([1.0, 1.0]) == first_is_best([2.0, 1.0]) == 0


@pytest.mark.parametrize(
    ("record", "letter"),
    (
        ({"prompt": "a", "response": "b"}, "has no wrong answers"),
        ({"prompt": "a", "response": "b", "distractors": [1, 2]}, "has no wrong answers"),
        ({"prompt": "a", "response": "b", "distractors": ["c", "b"]}, "right answer among the wrong"),
        ({"text": "a"}, "no record with a prompt"),
    ),
)
def test_records_that_ask_nothing(tmp_path, record, letter):
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    with pytest.raises(UserError, match=letter):
        suite("multiple_choice", source=decode(f"jsonl:{tmp_path / 'x.jsonl'}", SourceChoice))(context(None))


def test_a_missing_file_is_said_beforehand():
    from adapt.config import load

    choice = decode("jsonl:gone.jsonl", SourceChoice)
    found = list(suite("multiple_choice", source=choice).config.problems(load("nbdiff").recipe))
    assert any("gone.jsonl" in p.what for p in found)
