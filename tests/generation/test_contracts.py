"""Every kind of contract against the slow reference: no cache, a dense mask, one row (float64)."""

from __future__ import annotations

import pytest
import torch

from adapt.components import samplers
from adapt.errors import UserError
from adapt.generation.contract import Contract
from tests import tiny
from tests.generation.reference import KINDS, MASK, confident, decode_kind, name, tell

PROMPT = [17, 45, 200, 31, 99, 7, 120]  # 7 tokens: a multiple of no block size above 1
F64 = torch.float64


def sampler(**fields):
    entry = samplers["block_diffusion"]
    return entry.factory(entry.config_type(**fields))


@pytest.fixture(scope="module")
def plain():
    return tiny.tiny_model("llama", dtype=F64)


@pytest.mark.parametrize("tau", (0.05, 0.9, 1.0))
@pytest.mark.parametrize("b", (1, 2, 4, 8, 32))
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_equals_the_uncached_reference(plain, kind, b, tau):
    """Invariant 5 for every contract; 21 new tokens leave a partial last block for every b above 1 but 2 and 4 on the
    grid of block contexts, where 19 do."""
    model = tell(plain, kind, b)
    for prompt, new in ((PROMPT, 21), (PROMPT, 19), (PROMPT + PROMPT[:1], 13)):
        expected, forwards = decode_kind(model, kind, prompt, new, b=b, choose=confident(tau))
        got = sampler(threshold=tau).generate(model, prompt, max_new_tokens=new)
        assert got.tokens == expected
        assert got.forwards == forwards
        assert sorted(p for p, _ in got.reveal_order) == list(range(new))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kind", [k for k in KINDS if k.block_first == "noisy"], ids=name)
def test_every_family(family, kind):
    model = tell(tiny.tiny_model(family, seed=1, dtype=F64), kind, 8)
    expected, _ = decode_kind(model, kind, PROMPT, 19, b=8, choose=confident(0.3))
    assert sampler(threshold=0.3).generate(model, PROMPT, max_new_tokens=19).tokens == expected


@pytest.mark.parametrize("prediction", ("shifted", "inplace"))
def test_without_a_block_size_the_answer_is_one_block(plain, prediction):
    kind = Contract(context_mask="document", prediction=prediction)
    model = tell(plain, kind)
    expected, forwards = decode_kind(model, kind, PROMPT, 12, b=None, choose=confident(0.3))
    got = sampler(threshold=0.3).generate(model, PROMPT, max_new_tokens=12)
    assert (got.tokens, got.forwards) == (expected, forwards)
    assert max(step for _, step in got.reveal_order) == forwards, "one block: its steps are all there is"


@pytest.mark.parametrize("temperature", (0.0, 0.9))
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_batch_equals_each_row_alone(plain, kind, temperature):
    """Invariant 12: prompts with tails of every width (and one shorter than a block), one at the model's last
    position, an EOS that some rows meet."""
    model = tell(plain, kind, 4)
    settings = sampler(threshold=0.4, temperature=temperature)
    longest = [5 + i % 300 for i in range(503)]
    prompts = [PROMPT, PROMPT[:4], longest, PROMPT[:2], PROMPT[::-1] * 2, [5], PROMPT[:3]]
    eos = (settings.generate(model, PROMPT, max_new_tokens=16).tokens[9],)
    together = settings.generate_batch(model, prompts, max_new_tokens=16, eos_ids=eos, seed=3)
    for i, (prompt, row) in enumerate(zip(prompts, together, strict=True)):
        alone = settings.generate(model, prompt, max_new_tokens=16, eos_ids=eos, seed=3 + i)
        assert (row.tokens, row.forwards, row.reveal_order, row.stopped_by) == (
            alone.tokens,
            alone.forwards,
            alone.reveal_order,
            alone.stopped_by,
        )
        assert MASK not in row.tokens
        assert row.tokens == [t for t in row.tokens if t not in eos] + list(eos) * (row.stopped_by == "eos")
    assert {"context", "eos"} & {row.stopped_by for row in together}


@pytest.mark.parametrize("attention", ("eager", "adapt"))
@pytest.mark.parametrize("context", ("causal", "block", "document"))
def test_attention_implementations_agree(plain, attention, context):
    from adapt.models import attention as ours

    kind = Contract(context_mask=context, prediction="inplace", block_first="noisy")
    other = tell(tiny.tiny_model("llama", dtype=F64), kind, 8)
    if attention == "adapt":
        ours.register()
    other.set_attn_implementation(attention)
    prompts = [PROMPT, PROMPT[:3], PROMPT * 3]
    one, two = (
        sampler(threshold=0.2).generate_batch(m, prompts, max_new_tokens=19) for m in (tell(plain, kind, 8), other)
    )
    assert [g.tokens for g in one] == [g.tokens for g in two]


def test_commit_of_a_block_context_leaves_the_cache_of_a_block_causal_forward(plain, monkeypatch):
    import transformers

    made = []

    class Recorded(transformers.DynamicCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(transformers, "DynamicCache", Recorded)
    b = 4
    model = tell(plain, Contract(context_mask="block", prediction="inplace", block_first="noisy"), b)
    got = sampler(threshold=0.3).generate(model, PROMPT, max_new_tokens=19)
    cache = next(c for c in made if c.get_seq_length())
    text = (PROMPT + got.tokens)[:24]  # of 26: the last, partial block is never committed
    assert cache.get_seq_length() == len(text)
    number = torch.arange(len(text)) // b
    mask = (number[None] <= number[:, None])[None, None]
    with torch.no_grad():
        whole = model(torch.tensor([text]), attention_mask=mask, use_cache=True).past_key_values
    for ours, theirs in zip(cache.layers, whole.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("field", "value", "letter"),
    (
        ("context_mask", "blocks", "Did you mean 'block'"),
        ("prediction", "in_place", "inplace"),
        ("noisy_attention", "full", "bidirectional"),
        ("block_first", "head", "ar, noisy"),
        ("threshold", 1.5, r"\(0, 1\]"),
        ("block_size", 0, "1 token or more"),
        ("mask_token_id", 320, "vocabulary"),
    ),
)
def test_a_config_that_makes_no_sense_is_refused(field, value, letter):
    model = tell(tiny.tiny_model(), Contract(), 4)
    setattr(model.config, field, value)
    with pytest.raises(UserError, match=letter):
        sampler().generate(model, PROMPT, max_new_tokens=4)


def test_a_block_wider_than_the_sliding_window_is_refused():
    model = tell(tiny.tiny_model("mistral", sliding_window=16), Contract(), 32)
    with pytest.raises(UserError, match="sliding window of 16"):
        sampler().generate(model, PROMPT, max_new_tokens=4)
    assert len(sampler(block_size=16).generate(model, PROMPT, max_new_tokens=4).tokens) == 4


def test_the_threshold_is_the_models_own_unless_given(plain):
    model = tell(plain, Contract(), 8)
    model.config.threshold = 0.05
    try:
        own = sampler().generate(model, PROMPT, max_new_tokens=24)
        assert own.forwards == sampler(threshold=0.05).generate(model, PROMPT, max_new_tokens=24).forwards
        assert own.forwards < sampler(threshold=1.0).generate(model, PROMPT, max_new_tokens=24).forwards
    finally:
        del model.config.threshold
