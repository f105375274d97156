"""Muon and SOAP as a recipe selects them: checked keys, and runs that go on bit for bit."""

from __future__ import annotations

import pytest

from adapt.config import resolve
from adapt.errors import StopRequested
from adapt.train.fit import fit
from adapt.train.validate import problems
from tests import tiny
from tests.recipes import tiny_recipe
from tests.train.test_fit import assert_same_run, stop_after

MUON = {"name": "muon", "lr": 1e-3}
SOAP = {"name": "soap", "lr": 1e-3, "precondition_frequency": 2}


@pytest.mark.parametrize("optimizer", [MUON, SOAP])
def test_invariant_13_runs_resume_bit_for_bit(optimizer, tmp_path, monkeypatch):
    base = tiny.save_tiny(tmp_path / "base", attention_dropout=0.2)
    over = {"optimizer": optimizer, "evaluation": {"suites": []}}
    fit(resolve(tiny_recipe(base, tmp_path, run={"name": "straight"}, **over)))
    broken = tiny_recipe(base, tmp_path, run={"name": "broken"}, **over)
    with monkeypatch.context() as patched, pytest.raises(StopRequested, match="after step 3"):
        stop_after(patched, 3)
        fit(resolve(broken))
    fit(resolve(broken), "yes")
    assert_same_run(tmp_path / "runs" / "straight", tmp_path / "runs" / "broken")


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        (MUON | {"momentum": 1.0}, "optimizer.momentum"),
        (MUON | {"ns_steps": 0}, "optimizer.ns_steps"),
        (MUON | {"ns_coefficients": [1.0, 2.0]}, "optimizer.ns_coefficients"),
        (MUON | {"eps": 0.0}, "optimizer.eps"),
        (MUON | {"other": {"lr": -1.0}}, "optimizer.other.lr"),
        (SOAP | {"shampoo_beta": 1.0}, "optimizer.shampoo_beta"),
        (SOAP | {"precondition_frequency": 0}, "optimizer.precondition_frequency"),
        (SOAP | {"max_precond_dim": 0}, "optimizer.max_precond_dim"),
    ],
)
def test_ranges(fields, where, tiny_base, tmp_path):
    assert where in [p.where for p in problems(resolve(tiny_recipe(tiny_base, tmp_path, optimizer=fields)))]
