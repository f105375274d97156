"""One recurrence in four forms: what each must agree on (LAWCAT spec, invariants 1 to 5 and 8)."""

from __future__ import annotations

import math

import pytest
import torch

from adapt.models.linear_attention import chunked, floor, quadratic, recurrent

GATES = {"mild": 0.05, "strong": 2.0, "extreme": 12.0}


def inputs(length=75, gate="mild", heads=2, keys=6, values=5, channel=True, dtype=torch.float64, seed=0):
    """Positive keys and queries (as feature maps make them), with values that end in a one."""
    draw = torch.Generator().manual_seed(seed)
    shape = 2, heads, length
    q, k = (torch.randn(*shape, keys, generator=draw, dtype=torch.float64).mul(2).softmax(-1) for _ in range(2))
    v = torch.randn(*shape, values, generator=draw, dtype=torch.float64)
    v = torch.cat([v, torch.ones(*shape, 1, dtype=torch.float64)], -1)
    g = -torch.rand(*shape, keys if channel else 1, generator=draw, dtype=torch.float64) * GATES[gate]
    return [x.to(dtype) for x in (q, k, v, g)]


def normalised(out):
    return out[..., :-1] / (out[..., -1:] + 1e-10)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("channel", [True, False])
@pytest.mark.parametrize("chunk", [16, 32, 64, 256])
def test_invariant_1_quadratic_recurrent_and_exact_chunks_agree(gate, channel, chunk):
    x = inputs(gate=gate, channel=channel)
    state = torch.rand(2, 2, 6, 6, dtype=torch.float64)
    expected, last = quadratic(*x, state=state)
    for found, end in (recurrent(*x, state=state), chunked(*x, state=state, chunk=chunk, exact=True)):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(end, last, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 64])
def test_invariant_1_at_any_length(length):
    x = inputs(length)
    torch.testing.assert_close(chunked(*x, chunk=32, exact=True), recurrent(*x), atol=1e-12, rtol=1e-12)


def test_the_fast_form_is_the_same_function_above_its_floor():
    q, k, v, g = inputs(200, "strong")
    g = g.clamp_min(floor(64))
    torch.testing.assert_close(chunked(q, k, v, g, chunk=64), recurrent(q, k, v, g), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("channel", [True, False])
def test_invariant_2_gradients_agree(exact, channel):
    x = inputs(40, "strong", channel=channel)
    x[3] = x[3].clamp_min(floor(32))
    x = [t.requires_grad_() for t in x]
    weight = torch.randn(2, 2, 40, 5, dtype=torch.float64)
    loss = [(normalised(f(*x)[0]) * weight).sum() for f in (quadratic, lambda *a: chunked(*a, chunk=32, exact=exact))]
    for a, b in zip(*(torch.autograd.grad(value, x) for value in loss), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_invariant_3_float32_is_close_to_float64(gate, chunk):
    x = inputs(200, gate, keys=32)
    single = [t.float() for t in x]
    expected = normalised(recurrent(*x)[0])
    exact = normalised(chunked(*single, chunk=chunk, exact=True)[0])
    assert (exact - expected).abs().max() < 1e-4
    assert (normalised(recurrent(*single)[0]) - expected).abs().max() < 1e-4
    x[3] = x[3].clamp_min(floor(chunk))
    single[3] = x[3].float()
    fast = normalised(chunked(*single, chunk=chunk)[0])
    assert (fast - normalised(recurrent(*x)[0])).abs().max() < 1e-5


def test_exact_chunks_are_finite_where_factors_would_overflow():
    q, k, v, g = inputs(128, "extreme", dtype=torch.float32)
    assert float(g.sum(2).min()) < -500
    out, state = chunked(q, k, v, g, chunk=64, exact=True)
    assert torch.isfinite(out).all()
    assert torch.isfinite(state).all()


@pytest.mark.parametrize("form", ["recurrent", "exact", "fast"])
@pytest.mark.parametrize("at", [0, 15, 16, 31, 32, 47, 63])
def test_invariant_4_no_token_moves_an_earlier_output(form, at):
    """Bit for bit, in float32, at the borders of chunks and sub-blocks too."""
    x = inputs(70, "strong", dtype=torch.float32)
    x[3] = x[3].clamp_min(floor(32))
    run = recurrent if form == "recurrent" else lambda *a: chunked(*a, chunk=32, exact=form == "exact")
    changed = [t.clone() for t in x]
    for t in changed:
        t[:, :, at] *= 0.5
    before, after = run(*x)[0], run(*changed)[0]
    assert torch.equal(before[:, :, :at], after[:, :, :at])
    assert not torch.equal(before[:, :, at:], after[:, :, at:])


def test_invariant_5_outputs_are_convex_combinations():
    q, k, v, g = inputs(50, "strong")
    out = normalised(quadratic(q, k, v, g)[0])
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0, :-1], atol=1e-8, rtol=0)
    seen = v[..., :-1]
    assert (out <= seen.cummax(2).values + 1e-8).all()
    assert (out >= seen.cummin(2).values - 1e-8).all()
    q, k, v, g = inputs(50, "mild")
    q, k = q + 0.1, k + 0.1  # where the sum of weights is far above the epsilon beside it
    out = normalised(quadratic(q, k, v, g)[0])
    for scaled in ((3 * q, k, v, g), (q, 0.2 * k, v, g)):
        torch.testing.assert_close(normalised(quadratic(*scaled)[0]), out, atol=1e-8, rtol=0)


@pytest.mark.parametrize("channel", [True, False])
@pytest.mark.parametrize(
    "lengths",
    [[32, 32, 6], [5, 4, 3, 58], [70], [1] * 20 + [50], [31, 1, 1, 37], [64, 6]],
    ids=["chunk edges", "twice in a chunk", "one", "single tokens", "around an edge", "second edge"],
)
def test_invariant_8_packed_documents_are_separate_documents(lengths, channel):
    x = inputs(sum(lengths), "strong", channel=channel)
    x[3] = x[3].clamp_min(floor(32))
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1)
    alone = [recurrent(*(t[:, :, sum(lengths[:i]) :][:, :, :n] for t in x)) for i, n in enumerate(lengths)]
    expected, last = torch.cat([out for out, _ in alone], 2), alone[-1][1]
    forms = {
        "quadratic": quadratic(*x, segments=segments),
        "recurrent": recurrent(*x, segments=segments),
        "exact": chunked(*x, segments=segments, chunk=32, exact=True),
        "fast": chunked(*x, segments=segments, chunk=32),
    }
    for name, (out, state) in forms.items():
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(state, last, atol=1e-12, rtol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_a_given_state_belongs_to_the_first_document():
    x = inputs(40)
    state = torch.rand(2, 2, 6, 6, dtype=torch.float64)
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor([9, 20, 11])).expand(2, -1)
    expected = recurrent(*x, segments=segments, state=state)
    torch.testing.assert_close(quadratic(*x, segments=segments, state=state), expected, atol=1e-12, rtol=1e-12)
    found = chunked(*x, segments=segments, state=state, chunk=16, exact=True)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_the_floor_is_what_float32_can_hold():
    """The fast form's largest factor is exp of the decays of a whole chunk."""
    for chunk in (16, 64, 128):
        assert math.isfinite(float(torch.tensor(-floor(chunk) * chunk, dtype=torch.float32).exp()))
