"""Cached block-diffusion decoding against an uncached reference with dense masks, token for token, in
float64."""

from __future__ import annotations

import pytest
import torch

from adapt.components import samplers
from adapt.errors import UserError
from tests import tiny
from tests.generation.reference import EOS, MASK, decode

PROMPT = [17, 45, 200, 31, 99, 7, 120]  # 7 tokens: a multiple of no block size above 1
F64 = torch.float64


def sampler(**fields):
    entry = samplers["block_diffusion"]
    return entry.factory(entry.config_type(**({"mask_token_id": MASK} | fields)))


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model("llama", dtype=F64)


@pytest.mark.parametrize("b", (1, 2, 4, 8, 32))
@pytest.mark.parametrize("tau", (0.05, 0.9, 1.0))
def test_cached_equals_uncached(model, b, tau):
    """Invariant 5; 21 new tokens leave a partial last block for every b above 1."""
    expected, forwards = decode(model, PROMPT, 21, b=b, tau=tau)
    got = sampler(block_size=b, threshold=tau).generate(model, PROMPT, max_new_tokens=21)
    assert got.tokens == expected
    assert got.forwards == forwards
    assert got.stopped_by == "length"
    assert got.tokens_per_forward == 21 / forwards


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("rule", ("confidence", "sequential"))
def test_every_family_and_rule(family, rule):
    model = tiny.tiny_model(family, seed=1, dtype=F64)
    expected, forwards = decode(model, PROMPT, 19, b=8, tau=0.3, rule=rule)
    got = sampler(block_size=8, threshold=0.3, rule=rule).generate(model, PROMPT, max_new_tokens=19)
    assert (got.tokens, got.forwards) == (expected, forwards)


@pytest.mark.parametrize("attention", ("eager", "adapt"))
def test_attention_implementations_agree(model, attention):
    """A bool mask would be silently wrong under eager attention; ours is converted."""
    from adapt.models import attention as ours

    other = tiny.tiny_model("llama", dtype=F64)
    if attention == "adapt":
        ours.register()
    other.set_attn_implementation(attention)
    settings = {"block_size": 8, "threshold": 0.2}
    prompts = [PROMPT, PROMPT[:3]]
    one = sampler(**settings).generate_batch(model, prompts, max_new_tokens=19)
    two = sampler(**settings).generate_batch(other, prompts, max_new_tokens=19)
    assert [g.tokens for g in one] == [g.tokens for g in two]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_block_of_one_is_greedy_generate(family):
    model = tiny.tiny_model(family, seed=2, dtype=F64)
    expected = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT)),
        max_new_tokens=24,
        do_sample=False,
        suppress_tokens=[MASK],
        eos_token_id=None,
        pad_token_id=2,
    )
    got = sampler(block_size=1).generate(model, PROMPT, max_new_tokens=24)
    assert got.tokens == expected[0, len(PROMPT) :].tolist()
    assert got.forwards == 24


def test_commit_leaves_an_autoregressive_cache(model, monkeypatch):
    """Invariant 4: after the last commit the cache is the AR model's of the same text, and as long as
    that."""
    import transformers

    made = []

    class Recorded(transformers.DynamicCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(transformers, "DynamicCache", Recorded)
    got = sampler(block_size=8, threshold=0.3).generate(model, PROMPT, max_new_tokens=21)
    cache = next(c for c in made if c.get_seq_length())
    text = PROMPT + got.tokens[:16]  # the last, partial block is never committed: nothing comes after it
    assert cache.get_seq_length() == len(text)
    with torch.no_grad():
        plain = model(torch.tensor([text]), use_cache=True).past_key_values
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=1e-12)


def test_denoising_forward_equals_the_training_forward(model):
    """Invariant 4: the logits a block is revealed by are the noisy logits of `[noisy | clean]` training
    rows."""
    from transformers import DynamicCache

    from adapt.generation.blocks import forward
    from adapt.generation.rows import visible
    from adapt.models.layout import Layout

    b, text = 4, [*PROMPT, 9]  # the block [8, 12) follows two whole ones
    noisy = [50, MASK, 61, MASK]
    clean = [*text, 50, 60, 61, 62]
    pos = torch.arange(12)[None]
    layout = Layout.noisy_then_clean(torch.zeros_like(pos), pos, pos // b)
    row = torch.tensor([clean[:8] + noisy + clean])
    cache = DynamicCache()
    with torch.no_grad():
        trained = model(
            row,
            position_ids=torch.cat([pos, pos], 1),
            attention_mask=layout.dense()[:, None],
            use_cache=False,
        )
        forward(model, cache, torch.tensor([text]), pos[:, :8], None, keep=1)
        seen = visible(torch.ones(1, 8, dtype=torch.bool), b, causal=False)
        cached = forward(model, cache, torch.tensor([noisy]), pos[:, 8:], seen, keep=0)
    torch.testing.assert_close(cached[0], trained.logits[0, 8:12], rtol=0, atol=1e-12)


def test_batch_equals_each_row_alone(model):
    """Invariant 12: unequal prompts, rows that finish at different times, one of them at the model's last
    position."""
    longest = [5 + i % 300 for i in range(500)]
    prompts = [PROMPT, longest, PROMPT[:2], PROMPT[::-1], [EOS]]
    settings = sampler(block_size=8, threshold=0.3)
    eos = common_token(settings, model, prompts)
    together = settings.generate_batch(model, prompts, max_new_tokens=30, eos_ids=eos)
    for prompt, row in zip(prompts, together, strict=True):
        alone = settings.generate(model, prompt, max_new_tokens=30, eos_ids=eos)
        assert (row.tokens, row.forwards, row.reveal_order, row.stopped_by) == (
            alone.tokens,
            alone.forwards,
            alone.reveal_order,
            alone.stopped_by,
        )
        assert MASK not in row.tokens
    assert {"eos", "context"} <= {row.stopped_by for row in together}
    assert len({len(row.tokens) for row in together}) > 2


def common_token(settings, model, prompts) -> tuple[int]:
    """A token that appears in the middle of the first continuation: an EOS that some rows meet."""
    return (settings.generate(model, prompts[0], max_new_tokens=30).tokens[12],)


@pytest.mark.parametrize("tau", (0.05, 0.3, 1.0))
def test_rows_of_a_batch_have_blocks_of_their_own_width(model, tau):
    """Near the model's last position every row has other room: slots one row lacks are not seen by it either."""
    prompts = [[5 + (i * i + n) % 300 for i in range(n)] for n in range(496, 512)]
    settings = sampler(block_size=8, threshold=tau)
    together = settings.generate_batch(model, prompts, max_new_tokens=12)
    assert [len(r.tokens) for r in together] == [min(12, 512 - len(p)) for p in prompts]
    for prompt, row in zip(prompts, together, strict=True):
        alone = settings.generate(model, prompt, max_new_tokens=12)
        assert (row.tokens, row.reveal_order, row.forwards) == (alone.tokens, alone.reveal_order, alone.forwards)


def test_sampled_batch_equals_each_row_alone(model):
    """Rows take different numbers of steps for a block, and yet each draws what it would draw alone."""
    settings = sampler(block_size=8, threshold=0.4, temperature=0.8, top_p=0.9)
    prompts = [PROMPT, PROMPT[:3], PROMPT[2:], PROMPT[::-1], PROMPT[:1]]
    together = settings.generate_batch(model, prompts, max_new_tokens=40, seed=5)
    assert len({row.forwards for row in together}) > 1
    for i, prompt in enumerate(prompts):
        alone = settings.generate(model, prompt, max_new_tokens=40, seed=5 + i)
        assert (together[i].tokens, together[i].reveal_order) == (alone.tokens, alone.reveal_order)


@pytest.mark.parametrize("rule", ("confidence", "sequential"))
def test_stops_at_eos_and_truncates(model, rule):
    settings = sampler(block_size=8, threshold=0.3, rule=rule)
    free = settings.generate(model, PROMPT, max_new_tokens=32).tokens
    for eos in sorted({free[0], free[8], free[11], free[-1]}):
        expected, forwards = decode(model, PROMPT, 32, b=8, tau=0.3, rule=rule, eos=(eos,))
        got = settings.generate(model, PROMPT, max_new_tokens=32, eos_ids=(eos,))
        assert (got.tokens, got.forwards) == (expected, forwards)
        assert got.tokens == free[: free.index(eos) + 1]
        assert got.stopped_by == "eos"
        assert max(p for p, _ in got.reveal_order) == len(got.tokens) - 1


def test_eos_id_zero_counts(model):
    """Id 0 is a token like any other."""
    even = tiny.tiny_model("llama", dtype=F64, tie_word_embeddings=False)
    with torch.no_grad():
        even.lm_head.weight.zero_()
    got = sampler(block_size=4).generate(even, PROMPT, max_new_tokens=9, eos_ids=(0,))
    assert got.tokens == [0]  # the first of equal logits


def test_mask_token_is_never_generated():
    """Even where the model wants nothing else."""
    model = tiny.tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.model.norm.weight.fill_(1)
        hidden = model.model(torch.tensor([PROMPT])).last_hidden_state[0]
        model.lm_head.weight[MASK] = 100 * hidden[-1]
    assert int(model(torch.tensor([PROMPT])).logits[0, -1].argmax()) == MASK
    for temperature in (0.0, 1.5):
        for name in ("block_diffusion", "ar"):
            entry = samplers[name]
            fields = {"block_size": 8, "mask_token_id": MASK} if name == "block_diffusion" else {}
            model.config.mask_token_id = MASK
            built = entry.factory(entry.config_type(temperature=temperature, **fields))
            for seed in range(3):
                assert MASK not in built.generate(model, PROMPT, max_new_tokens=40, seed=seed).tokens


def test_seed_decides(model):
    settings = sampler(block_size=8, temperature=1.0, top_k=50, top_p=0.95)
    draws = [settings.generate(model, PROMPT, max_new_tokens=24, seed=s).tokens for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    greedy = sampler(block_size=8)
    assert greedy.generate(model, PROMPT, max_new_tokens=24, seed=1).tokens == (
        greedy.generate(model, PROMPT, max_new_tokens=24, seed=2).tokens
    )


def test_reveal_order_and_events(model):
    events = []
    got = sampler(block_size=8, threshold=0.2).generate(model, PROMPT, max_new_tokens=21, on_event=events.append)
    assert sorted(p for p, _ in got.reveal_order) == list(range(21))
    assert [s for p, s in got.reveal_order if p % 8 == 0] == [0, 0, 0]
    commits = [e for e in events if e.kind == "commit"]
    committed = [pair for e in commits for pair in zip(e.positions, e.tokens, strict=True)]
    assert committed == list(enumerate(got.tokens))
    revealed = [(p, e.step) for e in events if e.kind == "reveal" for p in e.positions]
    assert revealed == got.reveal_order


def test_settings_come_from_the_model_and_zero_tokens_is_nothing(model):
    own = tiny.tiny_model("llama", dtype=F64)
    own.config.block_size, own.config.mask_token_id = 8, MASK
    entry = samplers["block_diffusion"]
    built = entry.factory(entry.config_type(threshold=0.3))
    assert built.generate(own, torch.tensor(PROMPT), max_new_tokens=20).tokens == (
        sampler(block_size=8, threshold=0.3).generate(model, PROMPT, max_new_tokens=20).tokens
    )
    nothing = built.generate(own, PROMPT, max_new_tokens=0)
    assert (nothing.tokens, nothing.forwards) == ([], 0)


@pytest.mark.parametrize("threshold", (0.0, -0.1, 1.01, float("nan")))
def test_threshold_outside_its_range_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        sampler(threshold=threshold)


def test_refusals(model):
    entry = samplers["block_diffusion"]
    with pytest.raises(UserError) as caught:
        entry.factory(entry.config_type()).generate(model, PROMPT, max_new_tokens=4)
    assert len(caught.value.problems) == 2  # block size and mask token, both at once
    built = sampler(block_size=8)
    for bad in ([], list(range(4, 300)) * 2, [319, 320]):
        with pytest.raises(UserError):
            built.generate(model, bad, max_new_tokens=4)
    with pytest.raises(UserError, match="EOS"):
        built.generate(model, PROMPT, max_new_tokens=4, eos_ids=(MASK,))
    with pytest.raises(UserError, match="negative"):
        built.generate(model, PROMPT, max_new_tokens=-1)
    with pytest.raises(UserError, match="context"):
        sampler(block_size=1024).generate(model, PROMPT, max_new_tokens=4)
    windowed = tiny.tiny_model("mistral", sliding_window=16)
    assert len(built.generate(windowed, PROMPT, max_new_tokens=9).tokens) == 9
    with pytest.raises(UserError, match="sliding window"):
        built.generate(windowed, PROMPT, max_new_tokens=10)
    flex = tiny.tiny_model("llama")
    flex.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="sdpa"):
        built.generate(flex, PROMPT, max_new_tokens=4)


def test_training_mode_comes_back():
    model = tiny.tiny_model("llama").train()
    sampler(block_size=4).generate(model, PROMPT, max_new_tokens=5)
    assert model.training
