"""`tokenizer.recipe`: a run builds the tokenizer it is made for; the shipped recipe of a new language, on a tiny twin."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from adapt.config import load, resolve
from adapt.config.decode import encode
from adapt.errors import UserError
from adapt.tokenization import proofs
from adapt.train.fit import fit
from adapt.train.validate import check
from tests import tiny
from tests.recipes import corpus, tiny_recipe
from tests.tokenization.byte_level import PORTUGUESE

TOKENS = 30


@pytest.fixture(autouse=True)
def _no_other_process(monkeypatch):
    """Starting one takes seconds, and tests of the extension do it."""
    monkeypatch.setattr(proofs, "reloaded_elsewhere", lambda *args: [])


@pytest.fixture
def recipe(tiny_base, tmp_path):
    """The shipped `cabrita` with its conversions, stages and suites, on a tiny model and made-up text."""
    (tmp_path / "pt.txt").write_text(PORTUGUESE)
    made = {
        "name": "built",
        "dir": str(tmp_path / "tokenizers"),
        "base": str(tiny_base),
        "tokens": TOKENS,
        "train": [{"source": f"path:{tmp_path / 'pt.txt'}"}],
        "workers": 1,
    }
    (tmp_path / "tokenizer.yaml").write_text(yaml.safe_dump(made))
    shipped = encode(load("cabrita").recipe)
    text = {"source": {"name": "path", "path": str(tmp_path / "pt.txt")}, "name": "pt"}
    english = {"source": {"name": "jsonl", "path": str(corpus(tmp_path))}, "name": "en"}
    held_out = {"source": {"name": "jsonl", "path": str(corpus(tmp_path, 12, seed=1))}, "name": "held-out"}
    data = {"seq_len": 64, "train": [text | {"weight": 0.8}, english | {"weight": 0.2, "replay": True}]}
    found = tiny_recipe(
        tiny_base,
        tmp_path,
        model={"conversions": shipped["model"]["conversions"]},
        data=data | {"eval": [held_out | {"guard": True}]},
        tokenizer={"recipe": str(tmp_path / "tokenizer.yaml")},
        objective=shipped["objective"],
        evaluation={"suites": shipped["evaluation"]["suites"], "limit": 4},
        generation={"samplers": ["ar"]},
    )
    stages = load("cabrita").plain["stages"]
    found["stages"] = [stage | {"trainer": {"steps": 2}} for stage in stages]
    return found


def test_a_run_builds_its_tokenizer_and_trains_new_rows_first(recipe, tiny_base, tmp_path):
    report = check(resolve(recipe))
    assert not report.problems
    assert any("not built yet" in line for line in report.unchecked)
    assert fit(resolve(recipe)) == 0
    folder = tmp_path / "tokenizers" / "built"
    export = tmp_path / "runs" / "tiny" / "export"
    assert json.loads((export / "config.json").read_text())["vocab_size"] == 384  # 320 + 30, up to a multiple of 64
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = PORTUGUESE[:300]
    tokenizers = [AutoTokenizer.from_pretrained(where) for where in (folder, export)]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    assert len(tokenizers[1](text)["input_ids"]) < len(tiny.tiny_tokenizer()(text)["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(export)
    ids = tokenizers[1](text, return_tensors="pt")["input_ids"]
    assert max(ids[0]) >= 320
    assert torch.isfinite(model(ids).logits).all()
    results = json.loads((export / "adapt.json").read_text())["results"]
    assert results["after"]["tokens_per_byte/held-out"] <= 1
    assert not check(resolve(recipe)).unchecked  # it is there now


def test_a_tokenizer_of_another_recipe_is_not_taken_for_it(recipe, tmp_path):
    fit(resolve(recipe))
    file = tmp_path / "tokenizer.yaml"
    file.write_text(file.read_text().replace(f"tokens: {TOKENS}", "tokens: 20"))
    (told,) = check(resolve(recipe)).problems
    assert told.where == "tokenizer.recipe"
    assert "another tokens than" in told.what


def test_problems_of_the_tokenizer_recipe_are_problems_of_the_run(recipe, tmp_path):
    recipe["tokenizer"] = {"recipe": "cabrita-pt", "path": str(tmp_path)}
    assert any(p.where == "tokenizer.recipe" and "leave one out" in p.what for p in check(resolve(recipe)).problems)
    recipe["tokenizer"] = {"recipe": "cabrita-ptt"}
    assert any("Did you mean 'cabrita-pt'" in p.what for p in check(resolve(recipe)).problems)
    (tmp_path / "tokenizer.yaml").write_text("name: built\ntokens: -3\n")
    recipe["tokenizer"] = {"recipe": str(tmp_path / "tokenizer.yaml")}
    assert any(p.where.startswith("tokenizer.recipe") for p in check(resolve(recipe)).problems)


def test_a_tokenizer_that_cannot_be_built_stops_the_run_before_weights(recipe, tmp_path, monkeypatch):
    (tmp_path / "pt.txt").write_text("")
    monkeypatch.setattr("adapt.train.fit.build_root", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match="tokenizer.recipe"):
        fit(resolve(recipe))
