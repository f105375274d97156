"""`trainer.deterministic`: the same bits from run to run, and an operation that cannot promise them is named."""

from __future__ import annotations

import os

import pytest
import torch

from adapt.config import resolve
from adapt.errors import UserError
from adapt.train import step
from adapt.train.deterministic import WORKSPACE, deterministic, prepare
from adapt.train.fit import fit
from tests.recipes import tiny_recipe
from tests.train.test_fit import assert_same_run


def test_two_runs_have_the_same_losses_and_weights_bit_for_bit(tiny_base, tmp_path, monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    seen = []
    plain = step.gradients

    def gradients(*args, **kwargs):
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ.get(WORKSPACE)))
        return plain(*args, **kwargs)

    monkeypatch.setattr("adapt.train.module.gradients", gradients)
    for name in ("first", "second"):
        recipe = tiny_recipe(tiny_base, tmp_path, run={"name": name}, trainer={"deterministic": True})
        assert fit(resolve(recipe)) == 0
    assert_same_run(tmp_path / "runs" / "first", tmp_path / "runs" / "second")
    assert seen
    assert set(seen) == {(True, ":4096:8")}
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_deterministic_form_is_named_with_the_key():
    ids, values = torch.zeros(2, dtype=torch.int64), torch.arange(2.0)
    with pytest.raises(UserError, match=r"trainer\.deterministic.*put_"), deterministic(True):
        torch.zeros(3).put_(ids, values)  # two values for one place: the last to come stays
    with pytest.raises(RuntimeError, match="another"), deterministic(True):
        raise RuntimeError("another error")


def test_nothing_is_set_unless_asked(monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    prepare(False)
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    assert WORKSPACE not in os.environ
