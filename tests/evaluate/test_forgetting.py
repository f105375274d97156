"""Forgetting through the real entry points: runs, stop rules, `adapt evaluate`."""

from __future__ import annotations

import argparse
import json

import pytest

from adapt.config import resolve
from adapt.errors import StopRequested
from adapt.evaluate import verb
from adapt.train.fit import fit
from adapt.train.validate import problems
from tests.train.test_fit import stop_after
from tests.train.test_teacher import dap, logged


def evaluated(*argv, capsys) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    capsys.readouterr()
    assert verb.evaluate(parser.parse_args([*map(str, argv), "--json"])) == 0
    return json.loads(capsys.readouterr().out)


def test_invariant_11_step_0_equals_stand_alone_evaluation_and_forgetting_starts_at_0(tiny_base, tmp_path, capsys):
    """Bits per byte at step 0 are those of the untouched checkpoint; the run's own are compared with them."""
    suites = {"suites": ["bpb", "accuracy", "kl_to_base"], "limit": 3}
    recipe = dap(tiny_base, tmp_path, evaluation=suites)
    fit(resolve(recipe))
    run = tmp_path / "runs" / "tiny"
    alone = evaluated(tiny_base, "-c", run / "config.yaml", capsys=capsys)
    for metric in ("bpb/held-out", "bpb/guard", "accuracy/guard"):
        assert logged(run, f"eval/{metric}")[0] == alone[metric]
    assert not [m for m in alone if m.startswith("forgetting")]
    forgotten, bits = logged(run, "eval/forgetting/guard"), logged(run, "eval/bpb/guard")
    assert forgotten[0] == 0.0
    assert forgotten[6] == bits[6] - bits[0] != 0.0
    assert logged(run, "eval/forgetting/worst") == forgotten
    again = evaluated(run, capsys=capsys)
    assert again == pytest.approx({k: logged(run, f"eval/{k}")[6] for k in again}, rel=1e-5, abs=1e-6)
    assert "forgetting/guard" in again
    fewer = evaluated(run, "--limit", "1", capsys=capsys)
    assert not [m for m in fewer if m.startswith("forgetting")]  # other rows than at the start


def test_the_start_survives_a_resume_and_rules_may_name_it(tiny_base, tmp_path, monkeypatch):
    recipe = dap(tiny_base, tmp_path, optimizer={"name": "adamw", "lr": 0.3})
    recipe["evaluation"] |= {"every": 1, "best": "forgetting/worst"}
    recipe["evaluation"]["stop"] = [{"metric": "forgetting/guard", "below": -0.5}]
    assert not problems(resolve(recipe))
    with monkeypatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, 1)
        fit(resolve(recipe | {"evaluation": {**recipe["evaluation"], "stop": []}}))
    fit(resolve(recipe), "yes")
    run = tmp_path / "runs" / "tiny"
    bits, forgotten = logged(run, "eval/bpb/guard"), logged(run, "eval/forgetting/guard")
    assert all(forgotten[s] == bits[s] - bits[0] for s in forgotten)
    assert max(forgotten) < 6  # the rule ended it (a random model gets better at everything)
    assert "forgetting/guard is" in (run / "log.txt").read_text()


def test_rules_that_name_what_is_no_guard_are_refused(tiny_base, tmp_path):
    recipe = dap(tiny_base, tmp_path)
    recipe["evaluation"]["best"] = "forgetting/held-out"
    (found,) = problems(resolve(recipe))
    assert found.where == "evaluation.best"


def test_a_start_that_was_not_measured_is_not_made_up(tiny_base, tmp_path):
    """The first stage measures nothing: what the second finds is no start."""
    recipe = dap(tiny_base, tmp_path, kl=0.0, trainer={"steps": 2, "batch_tokens": 256})
    suites, recipe["evaluation"] = recipe["evaluation"], {}
    fit(resolve(recipe | {"stages": [{"name": "a"}, {"name": "b", "evaluation": suites}]}))
    run = tmp_path / "runs" / "tiny"
    assert logged(run, "eval/bpb/guard")
    assert not logged(run, "eval/forgetting/guard")
