"""Self-speculation loses nothing: greedy it writes what AR decoding writes, sampled it has AR decoding's
distribution."""

from __future__ import annotations

import itertools

import pytest
import torch

from adapt.components import samplers
from adapt.errors import UserError
from adapt.generation.contract import Contract
from adapt.generation.self_speculation import agree, verify
from adapt.generation.terminal import text_of
from tests import tiny
from tests.generation.reference import KINDS, MASK, name, tell

PROMPT = [17, 45, 200, 31, 99, 7, 120]
CAUSAL = [k for k in KINDS if k.context_mask == "causal"]
F64 = torch.float64


def build(sampler: str, **fields):
    entry = samplers[sampler]
    return entry.factory(entry.config_type(**fields))


@pytest.fixture(scope="module")
def plain():
    return tiny.tiny_model("llama", dtype=F64)


@pytest.fixture(scope="module")
def agreeable():
    """Attention adds little to this model, so that drafts and AR pass agree now and then."""
    model = tiny.tiny_model("llama", seed=4, dtype=F64)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.05)
        model.model.embed_tokens.weight[:, 0] += 0.4
    return model


@pytest.mark.parametrize("steps", (1, 2, 8))
@pytest.mark.parametrize("b", (1, 2, 4, 8, 32))
@pytest.mark.parametrize("kind", CAUSAL, ids=name)
def test_greedy_is_ar_decoding(plain, agreeable, kind, b, steps):
    for model in (plain, agreeable):
        tell(model, kind, b)
        expected = build("ar").generate(model, PROMPT, max_new_tokens=21)
        got = build("self_speculation", steps=steps, threshold=0.3).generate(model, PROMPT, max_new_tokens=21)
        assert got.tokens == expected.tokens
        assert (got.stopped_by, sorted(p for p, _ in got.reveal_order)) == ("length", list(range(21)))
        assert got.forwards <= 1 + 20 * (1 + min(steps, b - 1)), "no round is without a new token"
        if b == 1:
            assert got.forwards == 21


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_and_every_end(family):
    """EOS among the drafts, a stop string, the model's last position."""
    model = tell(tiny.tiny_model(family, seed=1, dtype=F64), Contract(), 8)

    def decode(tokens):
        return text_of(tiny.tiny_tokenizer(), tokens)

    free = build("ar").generate(model, PROMPT, max_new_tokens=24)
    letter = next(c for c in decode(free.tokens)[8:] if c != "\ufffd")
    for options in (
        {"eos_ids": (free.tokens[9],)},
        {"stop": [letter], "decode": decode},
        {"eos_ids": (free.tokens[0],)},
    ):
        one, two = (build(s).generate(model, PROMPT, max_new_tokens=24, **options) for s in ("ar", "self_speculation"))
        assert (one.tokens, one.text, one.stopped_by) == (two.tokens, two.text, two.stopped_by)
    longest = [5 + i % 300 for i in range(507)]
    got = build("self_speculation").generate(model, longest, max_new_tokens=24)
    assert (got.stopped_by, len(got.tokens)) == ("context", 5)


def test_forwards_of_perfect_drafts(plain):
    """Prefill and one token; then each round of one drafting and one verifying forward yields a block's worth."""
    even = tell(tiny.tiny_model("llama", dtype=F64, tie_word_embeddings=False), Contract(), 8)
    with torch.no_grad():
        even.lm_head.weight.zero_()
    got = build("self_speculation", steps=1).generate(even, PROMPT, max_new_tokens=17)
    assert (got.tokens, got.forwards) == ([0] * 17, 1 + 2 * 2)
    assert got.tokens_per_forward == 17 / 5


@pytest.mark.parametrize("temperature", (0.0, 0.8))
def test_batch_equals_each_row_alone(agreeable, temperature):
    """Rows keep different numbers of drafts, so they have holes in the cache; and finish at different times."""
    model = tell(agreeable, Contract(), 8)
    settings = build("self_speculation", threshold=0.3, temperature=temperature, top_p=0.9 if temperature else None)
    prompts = [PROMPT, PROMPT[:3], [5 + i % 300 for i in range(500)], PROMPT[::-1], PROMPT[:1], PROMPT * 3]
    eos = (settings.generate(model, PROMPT, max_new_tokens=30, seed=5).tokens[20],)
    together = settings.generate_batch(model, prompts, max_new_tokens=30, eos_ids=eos, seed=5)
    for i, prompt in enumerate(prompts):
        alone = settings.generate(model, prompt, max_new_tokens=30, eos_ids=eos, seed=5 + i)
        assert (together[i].tokens, together[i].forwards, together[i].reveal_order) == (
            alone.tokens,
            alone.forwards,
            alone.reveal_order,
        )
        assert MASK not in together[i].tokens
    assert len({row.forwards for row in together}) > 2
    assert any(step > 0 for row in together for _, step in row.reveal_order), "some drafts are accepted"


@pytest.mark.parametrize(
    "fields",
    (
        {"temperature": 1.0},
        {"temperature": 1.0, "steps": 3, "threshold": 0.3},
        {"temperature": 1.0, "steps": 3, "threshold": 0.3, "block_size": 2},
        {"temperature": 0.7, "top_k": 3, "steps": 2, "threshold": 0.4},
    ),
)
def test_sampled_has_the_distribution_of_ar_decoding(fields):
    """Chi-square over all texts of four tokens, against their probabilities by the chain rule. A draft that samples
    while it denoises fails this."""
    new, draws, vocab = 4, 20_000, 6
    model = tiny.tiny_model("llama", seed=2, dtype=F64, vocab_size=vocab, num_hidden_layers=1)
    tell(model, Contract(prediction="inplace"), 4)
    exact = ar_distribution(model, [4, 1], new, fields)
    rows = build("self_speculation", **fields).generate_batch(model, [[4, 1]] * draws, max_new_tokens=new, seed=1)
    seen = dict.fromkeys(exact, 0)
    for row in rows:
        seen[tuple(row.tokens)] += 1
    assert sum(step > 0 for row in rows for _, step in row.reveal_order) > draws / 5, "many drafts are accepted"
    pooled = [(seen[t], draws * p) for t, p in exact.items() if draws * p >= 10]
    rare = [(seen[t], draws * p) for t, p in exact.items() if draws * p < 10]
    pooled.append((sum(s for s, _ in rare), sum(e for _, e in rare) + 1e-9))
    chi2 = sum((s - e) ** 2 / e for s, e in pooled if e > 1)
    degrees = len(pooled) - 1
    assert abs(chi2 - degrees) < 4 * (2 * degrees) ** 0.5
    assert all(s == 0 for t, s in seen.items() if exact[t] == 0)


def ar_distribution(model, prompt, new, fields) -> dict[tuple[int, ...], float]:
    vocab = model.config.vocab_size
    texts = torch.tensor(list(itertools.product(range(vocab), repeat=new)))
    with torch.no_grad():
        ids = torch.cat([torch.tensor([prompt]).expand(len(texts), -1), texts], 1)
        logits = model(ids).logits[:, len(prompt) - 1 : -1] / fields["temperature"]
    logits[..., MASK] = float("-inf")
    if "top_k" in fields:
        logits = logits.masked_fill(logits < logits.topk(fields["top_k"], -1).values[..., -1:], float("-inf"))
    p = logits.softmax(-1).gather(2, texts[..., None])[..., 0].prod(1)
    return dict(zip(map(tuple, texts.tolist()), p.tolist(), strict=True))


def test_verification_by_itself():
    """One drafted slot, a fine grid of uniform numbers: what comes out has the distribution p, whatever q."""
    torch.manual_seed(0)
    grid = 300
    points = (torch.arange(grid, dtype=F64) + 0.5) / grid
    for _ in range(5):
        p, q = torch.randn(2, 6, dtype=F64).mul(2).softmax(-1)
        q = torch.where(q < 0.05, 0, q)
        q = q / q.sum()
        out = torch.zeros(6, dtype=F64)
        for x in q.nonzero()[:, 0].tolist():
            u = torch.cartesian_prod(points, points)  # of the next token, of the test
            many = len(u)
            tokens = torch.tensor([[0, x]]).expand(many, 2)
            used = torch.ones(many, 2, dtype=torch.bool)
            wide = [torch.stack([d, d]).expand(many, 2, 6) for d in (p, q)]
            kept, after = verify(tokens, used, *wide, u)
            emitted = torch.where(kept == 2, x, after)
            out += q[x] * emitted.bincount(minlength=6) / many
        torch.testing.assert_close(out, p, atol=5e-3, rtol=0)


def test_agreement_by_itself():
    tokens = torch.tensor([[7, 1, 2, 3], [7, 1, 9, 3], [7, 9, 2, 3], [7, 1, 2, 0]])
    used = torch.ones(4, 4, dtype=torch.bool)
    used[3, 3] = False
    target = torch.tensor([[1, 2, 3, 4]]).expand(4, 4)
    kept, after = agree(tokens, used, target)
    assert (kept.tolist(), after.tolist()) == ([4, 2, 1, 3], [4, 2, 1, 3])


@pytest.mark.parametrize("context", ("block", "document"))
def test_only_causal_contexts_have_an_ar_pass(plain, context):
    model = tell(plain, Contract(context_mask=context), 8)
    with pytest.raises(UserError, match=f"context_mask={context}"):
        build("self_speculation").generate(model, PROMPT, max_new_tokens=4)


@pytest.mark.parametrize("fields", ({"steps": 0}, {"threshold": 0.0}, {"block_size": 0}))
def test_impossible_settings(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        build("self_speculation", **fields)
