"""`adapt data fetch | prepare | stats`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import yaml

from adapt.config.load import resolve
from adapt.conversion.base import apply_conversions
from adapt.data.prepare import prepare
from adapt.data.verbs import fetch, prepare_verb, stats
from adapt.errors import UserError
from adapt.pretrained import load_model, load_tokenizer
from adapt.pretrained.load import read_tokenizer
from tests.data.helpers import write_jsonl
from tests.data.packages import make_archive, make_deb
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
    out = " ".join(capsys.readouterr().out.split())  # lines are cut where the folder's name is long
    assert "CC0-1.0" in out
    assert "licence not stated" in out
    assert "Texts of files and of the Hub were not copied" in out
    assert "Packages" not in out


def test_fetch_brings_packages_into_the_cache(tiny_base, tmp_path, capsys):
    archive = make_archive(
        tmp_path / "archive", *(make_deb(tmp_path, n, "1", {"usr/share/doc/a.txt": n.encode()}) for n in "xy")
    )
    sources = [
        {
            "source": {"name": "debian", "package": n, "suite": "s", "archive": archive, "files": ["usr/*"]},
            "licence": "x",
        }
        for n in ("x", "y")
    ]
    corpus = tmp_path / "own.yaml"
    corpus.write_text(yaml.safe_dump({"about": "Made up.", "sources": sources, "split": {"val": 0, "test": 0}}))
    data = {"train": [{"source": f"corpus:{corpus}"}], "eval": [], "cache": str(tmp_path / "cache")}
    resolved = resolve(tiny_recipe(tiny_base, tmp_path, data=data, evaluation={"suites": []}))
    with pytest.raises(UserError, match="Debian package x is not in the cache"):
        fetch(resolved, args())
    make_archive(tmp_path / "archive", *(tmp_path / f"{n}_1_all.deb" for n in "xy"), suite="s")
    assert fetch(resolved, args()) == 0
    out = capsys.readouterr().out
    assert "Packages now lie in the cache" in out
    assert "not copied" not in out
    assert sorted(p.name for p in (tmp_path / "cache").rglob("*.deb")) == ["x_1_all.deb", "y_1_all.deb"]


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


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_stats_prints_the_manifest(resolved, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert stats(resolved, args()) == 0
    out = capsys.readouterr().out
    for word in (
        "train/book",
        "eval/apart",
        "CC0-1.0",
        "not stated",
        "deduplicate",
        "1 malformed",
        "fingerprint",
    ):
        assert word in out
    assert "train.jsonl:21" in "".join(out.split()) or columns < 200
    assert all(len(line) <= columns for line in out.splitlines())
    assert "…" not in out
    assert stats(resolved, args(json=True)) == 0
    (manifest,) = json.loads(capsys.readouterr().out)
    assert manifest["train"][0]["bad_lines"]["count"] == 1


def test_stats_finds_changed_shards(resolved, capsys):
    assert prepare_verb(resolved, args()) == 0
    folder = Path(capsys.readouterr().out.splitlines()[0].rpartition(" ")[2])
    (file,) = folder.glob("tokens-*")
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(UserError, match="its contents changed"):
        stats(resolved, args())


@pytest.mark.parametrize("token", [None, "<|blank|>", "<reserved_0>"])
def test_data_is_tokenised_once_for_training_and_for_its_export(resolved, capsys, tmp_path, token):
    """The mask token is in the tokenizer from the start, so that the exported one finds the same shards."""
    plain = resolved.plain
    plain["model"]["conversions"] = [{"name": "mask_token", "token": token}]
    recipe = resolve(plain).recipe
    assert prepare_verb(resolve(plain), args()) == 0
    made = set(capsys.readouterr().out.splitlines())
    tokenizer = load_tokenizer(recipe)
    apply_conversions(recipe, load_model(recipe), tokenizer)  # as a run does
    tokenizer.save_pretrained(tmp_path / "export")
    for trained in (tokenizer, read_tokenizer(tmp_path / "export")):
        shards = prepare(recipe, trained)
        assert all(any(str(s.folder) in line for line in made) for s in [*shards.train, *shards.eval.values()])


def test_stages_that_share_their_data_are_prepared_once(resolved, capsys):
    plain = resolved.plain | {"stages": [{"name": "one"}, {"name": "two", "trainer": {"steps": 1}}]}
    assert prepare_verb(resolve(plain), args()) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
