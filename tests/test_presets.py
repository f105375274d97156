"""Every shipped recipe as a tiny twin: its own objective, evaluation and decoding on a tiny model, to the end."""

from __future__ import annotations

import json

import pytest

from adapt.config import load, resolve, shipped_recipes
from adapt.config.decode import encode
from adapt.train.fit import fit
from adapt.train.validate import check
from tests.recipes import tiny_recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_validate(name, tmp_path):
    """All problems would be named; what is out of reach is listed as not checked."""
    report = check(load(name, [f"run.dir={tmp_path}"]), offline=True)
    assert not report.problems, report.problems


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if not n.startswith("paper/")])
def test_tiny_twin_trains_evaluates_and_exports(name, tiny_base, tmp_path):
    shipped = encode(load(name).recipe)
    recipe = tiny_recipe(tiny_base, tmp_path)
    recipe["objective"] = shrunk(shipped["objective"])
    recipe["evaluation"] = {"suites": shipped["evaluation"]["suites"], "limit": 4, "every": 2}
    for suite in recipe["evaluation"]["suites"]:
        suite.update({k: 8 for k in ("prompt_tokens", "new_tokens") if k in suite})
    recipe["trainer"]["steps"] = 3
    assert fit(resolve(recipe)) == 0
    run = tmp_path / "runs" / "tiny"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line and line["loss"] is not None]
    config = json.loads((run / "export" / "config.json").read_text())
    for key, value in (("prediction", "prediction"), ("noisy_attention", "noisy_attention")):
        assert config[key] == recipe["objective"][value]
    assert config.get("block_size") == recipe["objective"]["block_size"]


def shrunk(objective: dict) -> dict:
    """Blocks of at most 8, grown within three steps."""
    size = objective["block_size"]
    objective["block_size"] = size and min(size, 8)
    growth = objective["growth"]
    if growth and growth["name"] == "geometric":
        growth |= {"every": 1}
    elif growth:
        growth |= {"steps": list(range(len(growth["sizes"])))}
    return objective
