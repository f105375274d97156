"""Held-out preference pairs: measured as pairs by one suite, and left alone by those that read text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adapt.data.batch import Batch
from adapt.errors import UserError
from tests import tiny
from tests.evaluate.test_suites import SETS, context, suite
from tests.objectives.test_dpo import full_log_probabilities, pairs_of


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model("qwen3", dtype=torch.float64)


def batches() -> list[Batch]:
    """Three pairs; the last two rows are padding, as a rank has it that got fewer than others."""
    filled = pairs_of([(20, 31), (14, 9)])
    rest = pairs_of([(12, 40), (7, 7)], seed=3)
    rest.labels[2:] = -100
    return [filled, replace(rest, sample_index=torch.tensor([4, 5, -1, -1]))]


def test_shares_and_margins_are_those_of_the_full_logits(model):
    found = suite("preference")(context(model, pair_sets={"pairs": lambda: iter(batches())}))
    with torch.no_grad():
        values = torch.cat([full_log_probabilities(model, b) for b in batches()])[:6]
    chosen, rejected = values[::2], values[1::2]
    tokens = sum(int((b.labels[::2] != -100).sum()) for b in batches())
    assert found["preference/pairs"] == pytest.approx(float((chosen > rejected).double().mean()))
    assert found["preference_margin/pairs"] == pytest.approx(float((chosen - rejected).mean()))
    assert found["chosen_nats/pairs"] == pytest.approx(-float(chosen.sum()) / tokens)


def test_pairs_are_no_text(model):
    here = context(model, pair_sets={"pairs": lambda: iter(batches())})
    assert {name.partition("/")[2] for name in suite("bpb")(here)} == set(SETS)
    with pytest.raises(UserError, match="no entry of data.eval has any"):
        suite("preference")(context(model))
