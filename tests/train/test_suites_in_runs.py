"""Suites that bring their own data: a run without held-out data has them, and its report draws their grids."""

from __future__ import annotations

import json

import pytest

from adapt.config import resolve
from adapt.train.fit import fit
from adapt.train.validate import problems
from tests.recipes import tiny_recipe


@pytest.fixture
def recipe(tiny_base, tmp_path):
    found = tiny_recipe(
        tiny_base,
        tmp_path,
        objective={"name": "next_token"},
        data={"train": [{"source": {"name": "passkey", "length": 300, "count": 8}}], "eval": [], "seq_len": 300},
        trainer={"steps": 2, "batch_tokens": 600},
        evaluation={
            "suites": [{"name": "passkey", "lengths": [250, 300], "depths": 2, "trials": 1}],
            "best": "passkey_nll/300",
        },
        generation={"prompts": [], "samplers": []},
    )
    return found


def test_a_run_on_made_up_texts_alone(recipe, tmp_path):
    assert fit(resolve(recipe)) == 0
    run = tmp_path / "runs" / "tiny"
    grids = [json.loads(line) for line in (run / "grids.jsonl").read_text().splitlines()]
    assert [g["step"] for g in grids] == [0, 2]
    assert grids[0]["rows"] == ["250", "300"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"eval/passkey/250", "eval/passkey_nll/300", "eval/passkey"} <= set().union(*lines)
    assert '<section id="heatmaps">' in (run / "report.html").read_text()


def test_metrics_are_checked_beforehand_without_held_out_data(recipe):
    recipe["evaluation"]["best"] = "passkey_nll/999"
    found = problems(resolve(recipe))
    assert any(p.where == "evaluation.best" and "no suite measures 'passkey_nll/999'" in p.what for p in found), found


def test_suites_of_held_out_data_still_ask_for_it(recipe):
    recipe["evaluation"] = {"suites": ["bpb", "passkey"]}
    found = [p for p in problems(resolve(recipe)) if p.where == "data.eval"]
    assert [p.what.partition(":")[0] for p in found] == ["bpb"]
