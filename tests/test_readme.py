"""What the README tells people to write is a recipe that works as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from adapt.config import load
from adapt.tokenization.recipe import shipped_tokenizers
from adapt.train.validate import check

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("text", BLOCKS)
def test_recipes_in_the_readme_validate(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(text)
    Path("corpus").mkdir()
    for file in ("corpus/page.jsonl", "held-out.jsonl", "general.jsonl"):
        Path(file).write_text(json.dumps({"text": "a page"}) + "\n")
    Path("my-tokenizer.yaml").write_text(shipped_tokenizers()["cabrita-pt"].read_text())
    resolved = load("my.yaml")
    report = check(resolved, offline=True)
    assert report.problems == []
    recipe = resolved.recipe
    assert any(dataset.source.name == "hub" for dataset in recipe.data.train)
    if growth := getattr(recipe.objective.config, "growth", None):
        largest = growth.build(recipe.objective.config.block_size).largest_step()
        assert largest < recipe.trainer.steps, "blocks should be whole before training ends"


def test_there_are_recipes_in_the_readme():
    assert BLOCKS
