"""Likelihood bounds against brute force, one document and one block at a time, without layouts (float64)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from adapt.evaluate.likelihood import ar_nats, elbo_nats
from adapt.evaluate.suites import noise_interval
from adapt.generation.contract import Contract
from adapt.models import attention
from adapt.objectives.base import Facts, Models
from tests import tiny
from tests.batches import packed
from tests.evaluate.test_suites import MASK, context, suite

FACTS = Facts(mask_token_id=MASK)
CONTRACTS = {
    "nbdiff": {},
    "in place": {"prediction": "inplace", "block_first": "noisy"},
    "block-causal": {"context_mask": "block", "prediction": "inplace", "block_first": "noisy"},
    "across edges": {"context_mask": "block", "block_first": "noisy"},
    "causal noise": {"noisy_attention": "causal"},
}


@pytest.fixture(scope="module")
def model():
    return attention.use(tiny.tiny_model(dtype=torch.float64))


def brute_force(model, ids: list[int], b: int, contract: Contract) -> float:
    """Every mask of every block of one document: dense masks over [noisy document | clean document]."""
    length = len(ids)
    i = torch.arange(length)
    block = i // b
    inside = block[:, None] == block[None]
    if contract.noisy_attention == "causal":
        inside = inside & (i[None] <= i[:, None])
    clean = block[None] <= block[:, None] if contract.context_mask == "block" else i[None] <= i[:, None]
    top = torch.cat([inside, block[None] < block[:, None]], 1)
    mask = torch.cat([top, torch.cat([torch.zeros_like(inside), clean], 1)])[None, None]
    text, total = torch.tensor(ids), 0.0

    def logits(noisy):
        with torch.no_grad():
            out = model(
                torch.cat([noisy, text])[None], position_ids=torch.cat([i, i])[None], attention_mask=mask
            ).logits[0]
        return out

    for start in range(0, length, b):
        stop = min(start + b, length)
        slots = list(range(start, stop))
        if contract.head_first:
            if start > 0:
                total += float(F.cross_entropy(logits(text)[length + start - 1][None], text[start][None]))
            slots = slots[1:]
        slots = [s for s in slots if s > 0]  # nothing predicts a document's first token
        for pattern in itertools.product([False, True], repeat=len(slots)):
            hidden = [s for s, h in zip(slots, pattern, strict=True) if h]
            if not hidden:
                continue
            noisy = text.clone()
            noisy[hidden] = MASK
            out = logits(noisy)[:length]
            out[:, MASK] = float("-inf")
            n, m = len(slots), len(hidden)
            weight = math.gamma(m) * math.gamma(n - m + 1) / math.gamma(n + 1)
            source = [s - (contract.prediction == "shifted") for s in hidden]
            total += weight * float(F.cross_entropy(out[source], text[hidden], reduction="sum"))
    return total


@pytest.mark.parametrize("kind", CONTRACTS)
@pytest.mark.parametrize("b", [1, 3, 4])
def test_exact_bound_equals_brute_force(model, kind, b):
    """Packed documents, partial blocks and padding, all blocks of a row scored at once."""
    contract = Contract(block_size=b, **CONTRACTS[kind])
    batch = packed([[7, 3], [4, 5]], pad=2)
    found = elbo_nats(Models(model), batch, contract, FACTS, samples=None)
    model.set_attn_implementation("sdpa")
    expected = []
    for row, lengths in enumerate([[7, 3], [4, 5]]):
        starts = itertools.accumulate([0, *lengths])
        documents = [batch.input_ids[row, s : s + n].tolist() for s, n in zip(starts, lengths, strict=False)]
        expected.append(sum(brute_force(model, d, b, contract) for d in documents))
    attention.use(model)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


def test_block_size_one_is_the_ar_likelihood(model):
    batch = packed([[9, 4]])
    exact = elbo_nats(Models(model), batch, Contract(block_size=1), FACTS, samples=None)
    torch.testing.assert_close(exact, ar_nats(Models(model), batch, FACTS), atol=1e-12, rtol=0)


def test_samples_estimate_the_exact_bound(model):
    batch, contract = packed([[12, 9]]), Contract(block_size=3)
    exact = float(elbo_nats(Models(model), batch, contract, FACTS, samples=None))
    drawn = float(elbo_nats(Models(model), batch, contract, FACTS, samples=400))
    assert drawn == pytest.approx(exact, rel=0.03)


def test_only_supervised_tokens_are_scored(model):
    """A prompt costs nothing: the score of a continuation, as harnesses ask for it."""
    batch = packed([[10]], prompt=6)
    exact = elbo_nats(Models(model), batch, Contract(block_size=4), FACTS, samples=None)
    alone = ar_nats(Models(model), batch, FACTS)
    assert 0 < float(exact) < 3 * float(alone)
    with pytest.raises(ValueError, match="exact scoring stops"):
        elbo_nats(Models(model), batch, Contract(block_size=32), FACTS, samples=None)


def test_elbo_suite_adds_up(model):
    found = suite("elbo", samples=None, block_size=4)(context(model))
    assert set(found) == {f"{k}/{d}/b4" for k in ("elbo", "elbo_bpb") for d in ("one", "two")}
    sampled = suite("elbo", samples=100, block_size=4)(context(model))
    assert sampled["elbo/one/b4"] == pytest.approx(found["elbo/one/b4"], rel=0.1)
    with pytest.raises(ValueError, match="samples"):
        suite("elbo", samples=0)


def test_noise_interval_finds_the_least_variance(monkeypatch):
    """Losses that vary by nothing within [0.3, 0.8) and by much outside of it."""
    bins = [b for b in range(20) for _ in range(50)]
    losses = [5.0 if 6 <= b < 16 else 5.0 + 10 * (k % 2) for k, b in enumerate(bins)]
    monkeypatch.setattr(noise_interval, "block_losses", lambda *a: (bins, losses))
    found = suite("noise_interval")(context(None))
    assert (found["noise_interval/low"], found["noise_interval/high"]) == (0.3, 0.8)
    assert found["noise_interval/variance"] == pytest.approx(0.0)
    assert found["noise_interval/full"] == pytest.approx(0.5 * 25 + 0.25 * 25, rel=1e-6)


def test_noise_interval_weighs_each_blocks_loss(model):
    """Mean over blocks of the losses it sorts = the sampled bound, less what the AR head gives."""
    here = context(model, contract=Contract(block_size=4, prediction="inplace", block_first="noisy"))
    batch = packed([[13, 9, 2], [24, 0]], pad=3)
    bins, losses = noise_interval.block_losses(here, here.contract, batch)
    drawn = here.call(lambda m: elbo_nats(m, batch, here.contract, FACTS, samples=1, seed=0))
    assert sum(losses) == pytest.approx(float(drawn.sum()), rel=1e-6)  # weights are float32
    assert len(bins) == len(losses) == 4 + 3 + 1 + 6
    assert all(0 <= b < 20 for b in bins)
