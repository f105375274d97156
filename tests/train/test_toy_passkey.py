"""A model that finds a number in its context still finds it when all of its attention has become linear."""

from __future__ import annotations

import json

import pytest

from adapt.data.needles import split_of
from benchmarks import toy_passkey


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_invariant_16_toy_passkey(tmp_path):
    """100 texts of 256 tokens, keys that were never trained on: at least 90 % found by the teacher and by the student,
    which has no attention layer left. What it finds at 512 and 1,024 tokens is printed."""
    teacher = toy_passkey.train(toy_passkey.teacher(tmp_path))
    assert teacher[0][256] < 0.1, "random weights find nothing"
    assert teacher[-1][256] >= 0.9
    export = tmp_path / "teacher" / "export"
    student = toy_passkey.train(toy_passkey.student(export, tmp_path, gate_bias=6.0))
    config = json.loads((tmp_path / "student-6-0" / "export" / "config.json").read_text())
    assert config["token_mixers"] == ["gated_linear", "gated_linear"]
    assert student[0][256] < 0.5, "what the conversion alone finds"
    assert student[-1][256] >= 0.9


def test_rows_that_teach_the_task_have_no_key_of_the_suite(tmp_path):
    from transformers import AutoTokenizer

    blank = toy_passkey.make_blank(tmp_path / "blank")
    tokenizer = AutoTokenizer.from_pretrained(blank)
    path = toy_passkey.write_whole(tmp_path / "whole.jsonl", tokenizer, 80, 40)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    keys = [int(text.rsplit(" ", 1)[1]) for text in texts]
    assert {split_of(key) for key in keys} == {"train"}
    assert all(f"The pass key is {key}. Remember it." in text for key, text in zip(keys, texts, strict=True))
    assert {len(tokenizer(text)["input_ids"]) for text in texts} == {79}, "a row, with the token that ends it"
