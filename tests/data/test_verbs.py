"""`adapt data fetch | prepare | stats`."""

from __future__ import annotations

import argparse
import json

import pytest

from adapt.config.load import resolve
from adapt.data.verbs import fetch, prepare_verb, stats
from adapt.errors import UserError
from tests.data.helpers import write_jsonl
from tests.recipes import tiny_recipe


@pytest.fixture
def resolved(tiny_base, tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [*({"text": f"page {i} of the book"} for i in range(20)), "{"])
    held_out = write_jsonl(tmp_path / "held.jsonl", [{"text": "a page apart"}])
    data = {
        "train": [{"source": {"name": "jsonl", "path": str(train), "licence": "CC0-1.0"}, "name": "book"}],
        "eval": [{"source": f"jsonl:{held_out}", "name": "apart"}],
        "max_bad_lines": 0.1,
        "cache": str(tmp_path / "cache"),
    }
    return resolve(tiny_recipe(tiny_base, tmp_path, data=data))


def args(**given):
    return argparse.Namespace(**given)


def test_fetch_opens_every_source(resolved, capsys):
    assert fetch(resolved, args()) == 0
    out = capsys.readouterr().out
    assert "CC0-1.0" in out
    assert "licence not stated" in out


def test_fetch_reports_what_cannot_be_read(resolved, tmp_path):
    (tmp_path / "train.jsonl").write_text("{\n[\n")
    (tmp_path / "held.jsonl").write_text("")
    with pytest.raises(UserError) as caught:
        fetch(resolved, args())
    assert [p.where for p in caught.value.problems] == ["data.train[0].source", "data.eval[0].source"]


def test_prepare_says_where_the_shards_lie(resolved, capsys, tmp_path):
    assert prepare_verb(resolved, args()) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("train/book: ")
    assert "20 documents" in first
    assert second.startswith("eval/apart: ")
    assert str(tmp_path / "cache" / "data" / "apart-") in second


def test_stats_prints_the_manifest(resolved, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert stats(resolved, args()) == 0
    out = capsys.readouterr().out
    for word in (
        "train/book",
        "eval/apart",
        "CC0-1.0",
        "not stated",
        "deduplicate",
        "1 malformed",
        "train.jsonl:21",
        "fingerprint",
    ):
        assert word in out
    assert stats(resolved, args(json=True)) == 0
    (manifest,) = json.loads(capsys.readouterr().out)
    assert manifest["train"][0]["bad_lines"]["count"] == 1


def test_stages_that_share_their_data_are_prepared_once(resolved, capsys):
    plain = resolved.plain | {"stages": [{"name": "one"}, {"name": "two", "trainer": {"steps": 1}}]}
    assert prepare_verb(resolve(plain), args()) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
