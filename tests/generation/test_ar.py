from __future__ import annotations

import pytest
import torch

from adapt.components import samplers
from adapt.errors import UserError
from adapt.generation.sampling import Sampling, draw, filtered, propose
from tests import tiny

PROMPT = [17, 45, 200, 31, 99, 7, 120]


def sampler(**fields):
    entry = samplers["ar"]
    return entry.factory(entry.config_type(**fields))


def greedy(model, prompt, new, **options):
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=2,
        **{"eos_token_id": None, **options},
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equals_greedy_generate(family):
    model = tiny.tiny_model(family, dtype=torch.float64)
    got = sampler().generate(model, PROMPT, max_new_tokens=25)
    assert got.tokens == greedy(model, PROMPT, 25)
    assert (got.forwards, got.stopped_by) == (25, "length")
    assert got.reveal_order == [(i, 0) for i in range(25)]


def test_stops_at_eos():
    model = tiny.tiny_model(dtype=torch.float64)
    free = greedy(model, PROMPT, 25)
    got = sampler().generate(model, PROMPT, max_new_tokens=25, eos_ids=(free[9],))
    assert got.tokens == greedy(model, PROMPT, 25, eos_token_id=free[9]) == free[: free.index(free[9]) + 1]
    assert got.stopped_by == "eos"


@pytest.mark.parametrize("window", (None, 12))
@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_batch_equals_each_row_alone(window, temperature):
    """Also beyond a sliding window, which the AR sampler supports."""
    model = tiny.tiny_model("mistral", dtype=torch.float64, sliding_window=window)
    settings = sampler(temperature=temperature, top_p=0.9 if temperature else None)
    prompts = [PROMPT, PROMPT[:2], PROMPT * 3, [5 + i % 300 for i in range(500)]]
    eos = (settings.generate(model, PROMPT, max_new_tokens=30).tokens[12],)
    rows = settings.generate_batch(model, prompts, max_new_tokens=30, eos_ids=eos)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        alone = settings.generate(model, prompt, max_new_tokens=30, eos_ids=eos, seed=i)
        assert (row.tokens, row.stopped_by, row.forwards) == (alone.tokens, alone.stopped_by, alone.forwards)
        if not temperature:
            assert row.tokens == greedy(model, prompt, len(row.tokens), eos_token_id=eos[0])
    assert rows[3].stopped_by in ("context", "eos")


def test_filters_match_transformers():
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = torch.randn(5, 40)
    for k, p in ((7, None), (None, 0.6), (9, 0.8), (1, None), (None, 1e-6)):
        expected = logits
        if k:
            expected = TopKLogitsWarper(k)(None, expected)
        if p:
            expected = TopPLogitsWarper(p)(None, expected)
        got = filtered(logits[None], Sampling(temperature=1.0, top_k=k, top_p=p))[0]
        torch.testing.assert_close(got, expected)


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    drawn = draw(probabilities.expand(1, 10_000, 6), uniform[None])[0]
    frequency = drawn.bincount(minlength=6) / 10_000
    torch.testing.assert_close(frequency, probabilities, atol=2e-4, rtol=0)
    edges = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)
    assert draw(probabilities.expand(1, 2, 6), edges).tolist() == [[1, 4]]  # never one of probability 0


def test_confidence_is_computed_in_at_least_fp32():
    logits = torch.tensor([[[10.0, 10.0, -1.0]]], dtype=torch.bfloat16)
    got = propose(logits, Sampling(), None, forbidden=0)
    assert got.confidence.dtype == torch.float32
    assert got.tokens.item() == 1
    assert got.probabilities[0, 0, 0] == 0


@pytest.mark.parametrize("fields", ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": 0}))
def test_bad_settings(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        sampler(**fields)


def test_bad_prompts():
    model = tiny.tiny_model()
    with pytest.raises(UserError, match="empty"):
        sampler().generate(model, [], max_new_tokens=4)
    with pytest.raises(UserError, match="512"):
        sampler().generate(model, [5] * 512, max_new_tokens=4)
    assert sampler().generate(model, [5] * 511, max_new_tokens=4).stopped_by == "context"
