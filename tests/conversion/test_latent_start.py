"""The start of latent attention: factors, ranks, RoPE dimensions, the shared key (x-ecomla spec, sections 2, 5 and 9)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from adapt.conversion.factors import spectrum
from adapt.conversion.latent_config import stock_config
from adapt.conversion.latent_shape import (
    LatentShape,
    TeacherShape,
    full_kv_rank,
    kv_ratio,
    parity_q_rank,
    rank_for,
    round_up,
)
from adapt.conversion.latent_start import Attention, rope_dims, shared_key, start_layer, theta_of
from adapt.export.verify import cache_bytes
from adapt.generation.absorb import absorb
from adapt.models.latent_attention import LatentAttention, LatentSpec, frequencies, rotate, rotation

SHAPE = TeacherShape(hidden=32, heads=4, kv_heads=2, head_dim=8)
SIGMAS = ("down", "up", "sqrt")


def drawn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def teacher(shape: TeacherShape, biases: bool = False, scale: float = 0.3) -> Attention:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = ((queries, shape.hidden), (keys, shape.hidden), (keys, shape.hidden), (shape.hidden, queries))
    weights = [scale * drawn(*size, seed=i) for i, size in enumerate(sizes)]
    return Attention(*weights, *[drawn(size[0], seed=9 + i) for i, size in enumerate(sizes[:3])] if biases else ())


def attend(a: Attention, shape: TeacherShape, x: torch.Tensor, theta: float | None) -> torch.Tensor:
    """Llama's attention on x [S, d], its RoPE in halves; theta None: no positions."""

    def heads(weight, bias):
        flat = x @ weight.T + (0 if bias is None else bias)
        return flat.unflatten(1, (-1, shape.head_dim)).transpose(0, 1)

    q, k, v = heads(a.q, a.q_bias), heads(a.k, a.k_bias), heads(a.v, a.v_bias)
    if theta is not None:
        half = shape.head_dim // 2
        angle = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
        q, k = (
            torch.cat([t[..., :half] * angle.cos() - t[..., half:] * angle.sin(),
                       t[..., half:] * angle.cos() + t[..., :half] * angle.sin()], -1)
            for t in (q, k)
        )  # fmt: skip
    k, v = (t.repeat_interleave(shape.heads // shape.kv_heads, 0) for t in (k, v))
    scores = q @ k.mT / math.sqrt(shape.head_dim)
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ a.o.T
    return out if a.v_bias is None and a.o_bias is None else out + (0 if a.o_bias is None else a.o_bias)


def student(found: dict[str, torch.Tensor], shape: TeacherShape, kv_rank: int, nope: int, rope: int, theta: float,
            q_rank: int | None = None):  # fmt: skip
    spec = LatentSpec(
        hidden_size=shape.hidden,
        num_heads=shape.heads,
        kv_rank=kv_rank,
        nope_dim=nope,
        rope_dim=rope,
        v_dim=shape.head_dim,
        q_rank=q_rank,
        rope={"rope_theta": theta, "rope_type": "default"},
        kv_norm="kv_a_layernorm.weight" in found,
        q_bias=any(n in found for n in ("q_proj.bias", "q_b_proj.bias")),
        kv_bias="kv_a_proj_with_mqa.bias" in found,
        o_bias="o_proj.bias" in found,
    )
    made = LatentAttention(spec, 0).double().eval()
    made.load_state_dict({n: w.double() for n, w in found.items()})
    return lambda x: made(x[None], torch.arange(len(x))[None])[0][0].detach()


SHAPES = {"mha": TeacherShape(32, 4, 4, 8), "gqa": SHAPE, "mqa": TeacherShape(32, 4, 1, 8), "wide": TeacherShape(16, 4, 2, 8)}  # fmt: skip


@pytest.fixture(params=SHAPES)
def shape(request) -> TeacherShape:
    return SHAPES[request.param]


@pytest.mark.parametrize("nope, rope", [(4, 4), (8, 2), (0, 8)])
@pytest.mark.parametrize("q_rank", [None, 16])
def test_modules_of_a_start_have_deepseeks_shapes(shape, nope, rope, q_rank):
    """Spec section 1, for all groupings of heads, and for d_n + d_r that are not d_h."""
    start = start_layer(teacher(shape, biases=True), shape, rope_dims("last", 8, nope, rope))
    found = start.weights(8, q_rank, rms=lambda down: 1.0, ballast=True)
    queries, latent = shape.heads * (nope + rope), (8 + rope, shape.hidden)
    wanted = {
        "kv_a_proj_with_mqa.weight": latent,
        "kv_a_proj_with_mqa.bias": (8 + rope,),
        "kv_a_layernorm.weight": (8,),
        "kv_b_proj.weight": (shape.heads * (nope + 8), 8),
        "o_proj.weight": (shape.hidden, shape.heads * 8),
        "o_proj.bias": (shape.hidden,),
    }
    if q_rank is None:
        wanted |= {"q_proj.weight": (queries, shape.hidden), "q_proj.bias": (queries,)}
    else:
        wanted |= {"q_a_proj.weight": (q_rank, shape.hidden), "q_b_proj.weight": (queries, q_rank)}
        wanted |= {"q_b_proj.bias": (queries,)}
    assert {name: tuple(weight.shape) for name, weight in found.items()} == wanted


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("biases", [False, True])
def test_at_full_rank_without_positions_it_is_the_teacher(shape, sigma, biases):
    """Spec 2.9: the first of the two exact cases (value biases go to the output, key biases cancel). One rank less is
    no longer the teacher."""
    a, x = teacher(shape, biases), drawn(7, shape.hidden, seed=5)
    start = start_layer(a, shape, rope_dims("last", 8, 8, 2))
    start = type(start)(**{**vars(start), "rope_key": torch.zeros_like(start.rope_key)})
    if biases:
        start = type(start)(**{**vars(start), "rope_key_bias": torch.zeros(2, dtype=torch.float64)})
    select = start.select  # the softmax scale is that of 8 + 2 dimensions, and the queries make up for it
    full, q_full = full_kv_rank(shape, 8), min(shape.hidden, shape.heads * 8)
    wanted = attend(a, shape, x, None)
    for q_rank in (None, q_full):
        out = student(start.weights(full, q_rank, sigma), shape, full, 8, 2, 1e4, q_rank)(x)
        torch.testing.assert_close(out, wanted, atol=1e-9, rtol=0)
    less = student(start.weights(full - 1, None, sigma), shape, full - 1, 8, 2, 1e4)(x)
    assert float((less - wanted).abs().max()) > 1e-4
    assert select is start.select


@pytest.mark.parametrize("rope", ["high", "stride"])
def test_one_key_value_head_with_all_its_frequencies_is_the_teacher(rope):
    """Spec 2.9: the second exact case, biases included."""
    shape = SHAPES["mqa"]
    a, x = teacher(shape, biases=True), drawn(9, shape.hidden, seed=5)
    start = start_layer(a, shape, rope_dims(rope, 8, 0, 8))
    out = student(start.weights(8), shape, 8, 0, 8, theta_of(rope, 1e4, 8, 8))(x)
    torch.testing.assert_close(out, attend(a, shape, x, 1e4), atol=1e-6, rtol=0)  # angles are fp32


@pytest.mark.parametrize("rope", ["high", "stride"])
def test_chosen_pairs_turn_as_in_the_teacher(rope):
    """One key head: scores of the rotated part are the teacher's over the same pairs."""
    head, size, theta = 16, 8, 500.0
    dims, x = rope_dims(rope, head, head - size, size), drawn(2, 6, head)
    pairs = dims.rope[0::2]
    angle = torch.arange(6)[:, None] * theta ** (-2 * pairs / head)
    first, second = x[..., pairs], x[..., pairs + head // 2]
    turned = torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)
    wanted = turned[0] @ turned[1].T
    own = {"rope_theta": theta_of(rope, theta, head, size), "rope_type": "default"}
    cos, sin = rotation(torch.arange(6)[None], own, size)
    q, k = rotate(x[0][None, None, :, dims.rope], cos, sin), rotate(x[1][None, None, :, dims.rope], cos, sin)
    torch.testing.assert_close((q @ k.mT)[0, 0], wanted, atol=1e-5, rtol=0)
    kept = torch.cat([dims.nope, dims.rope]).sort()[0]
    assert torch.equal(kept, torch.arange(head))
    wanted = theta ** (-2 * pairs.float() / head)
    torch.testing.assert_close(frequencies(own, size), wanted, atol=0, rtol=1e-5)


def test_the_authors_pair_second_halves():
    """Spec 2.5: the last d_r dims of a head, as they stand; both parts may overlap."""
    dims = rope_dims("last", 8, 8, 4)
    assert dims.rope.tolist() == [4, 5, 6, 7]
    assert dims.nope.tolist() == list(range(8))


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("size", [(24, 40), (40, 24)])
def test_factors_are_the_best_of_their_rank(sigma, size):
    """Eckart-Young: the squared error is the sum of the squared singular values left out."""
    matrix = drawn(*size)
    values = torch.linalg.svdvals(matrix)
    found = spectrum(matrix)
    torch.testing.assert_close(found.values, values, atol=1e-6, rtol=0)
    for rank in (1, 8, 23, 24):
        up, down = found.factors(rank, sigma)
        error = (matrix - up @ down).square().sum()
        torch.testing.assert_close(error, values[rank:].square().sum(), atol=1e-9, rtol=1e-9)
    up, down = found.factors(8, sigma)
    torch.testing.assert_close(up @ down, torch.matmul(*found.factors(8)), atol=1e-12, rtol=0)
    sizes = {"down": (torch.ones(8), values[:8]), "up": (values[:8], torch.ones(8)), "sqrt": (values[:8].sqrt(),) * 2}
    for got, wanted in zip((up.norm(dim=0), down.norm(dim=1)), sizes[sigma], strict=True):
        torch.testing.assert_close(got, wanted.double(), atol=1e-9, rtol=0)


def test_a_covariance_makes_the_factors_best_for_the_outputs():
    """No other map of that rank is closer on the inputs; the plain SVD among them."""
    matrix, inputs = drawn(20, 16), drawn(400, 16, seed=1) * torch.logspace(0, -2, 16, dtype=torch.float64)
    covariance = inputs.T @ inputs / len(inputs)

    def error(up, down):
        return float((inputs @ (matrix - up @ down).T).square().sum(1).mean())

    ours, plain = (spectrum(matrix, c).factors(6) for c in (covariance, None))
    values = torch.linalg.svdvals(matrix @ torch.linalg.cholesky(covariance))
    assert error(*ours) == pytest.approx(float(values[6:].square().sum()), rel=1e-6)
    assert error(*ours) < 0.9 * error(*plain)


@pytest.mark.parametrize("rank", [4, 12])
def test_repeated_heads_have_the_same_subspace_and_ranks(rank):
    """Spec 2.3: the SVD of n_kv heads instead of n_h, at a fraction of the cost."""
    shape, groups = SHAPE, SHAPE.heads // SHAPE.kv_heads
    a = teacher(shape)
    keys, values = (w.unflatten(0, (shape.kv_heads, 8)) for w in (a.k, a.v))
    few = spectrum(torch.cat([keys.flatten(0, 1), values.flatten(0, 1)]))
    many = spectrum(torch.cat([t.repeat_interleave(groups, 0).flatten(0, 1) for t in (keys, values)]))
    one, other = (s.factors(rank)[1] for s in (few, many))
    projectors = [torch.linalg.pinv(d) @ d for d in (one, other)]
    torch.testing.assert_close(*projectors, atol=1e-8, rtol=0)
    torch.testing.assert_close(many.values[:32], few.values * math.sqrt(groups), atol=1e-7, rtol=0)
    assert all(few.rank_of_energy(s) == many.rank_of_energy(s) for s in (0.3, 0.5, 0.9, 0.99))


def test_a_ballast_makes_the_norm_the_identity_for_every_token():
    """Spec 8.3: tokens whose latent is ten times smaller or larger than the others' too, unlike a calibrated norm."""
    shape = SHAPE
    x = drawn(9, 32, seed=5) * torch.logspace(-1, 1, 9, dtype=torch.float64)[:, None]
    start = start_layer(teacher(shape), shape, rope_dims("high", 8, 4, 4), "pca")

    def rms(down):
        return float((drawn(500, 32, seed=6) @ down.T).square().mean(1).sqrt().mean())

    wanted = student(start.weights(15), shape, 15, 4, 4, 100.0)(x)
    held = start.weights(16, rms=rms, ballast=True)
    calibrated = start.weights(16, rms=rms) | {"kv_a_layernorm.weight": torch.ones(16)}
    near, far = (student(w, shape, 16, 4, 4, 100.0)(x) for w in (held, calibrated))
    assert float((near - wanted).norm() / wanted.norm()) < 0.05
    assert float((far - wanted).norm() / wanted.norm()) > 0.3
    usual = x[4:5]
    near, wanted = (student(w, shape, r, 4, 4, 100.0)(usual) for w, r in ((held, 16), (start.weights(15), 15)))
    torch.testing.assert_close(near, wanted, atol=0, rtol=2e-3)


def test_query_heads_read_their_own_key_value_head():
    """Permuting key/value heads together with their groups of query heads changes nothing."""
    shape, x = SHAPE, drawn(7, 32, seed=5)

    def out(order):
        a, groups = teacher(shape), shape.heads // shape.kv_heads
        query = torch.tensor(order).repeat_interleave(groups) * groups + torch.arange(groups).repeat(shape.kv_heads)
        q, k, v = (
            w.unflatten(0, (-1, 8))[i].flatten(0, 1)
            for w, i in ((a.q, query), (a.k, torch.tensor(order)), (a.v, torch.tensor(order)))
        )
        o = a.o.unflatten(1, (-1, 8))[:, query].flatten(1)
        start = start_layer(Attention(q, k, v, o), shape, rope_dims("high", 8, 4, 4), "pca")
        return student(start.weights(16), shape, 16, 4, 4, 100.0)(x)

    torch.testing.assert_close(out([0, 1]), out([1, 0]), atol=1e-9, rtol=0)


def test_the_shared_key_is_the_mean_of_the_chosen_rows():
    a, dims = teacher(SHAPE), rope_dims("high", 8, 4, 4)
    start = start_layer(a, SHAPE, dims, "mean")
    wanted = a.k.unflatten(0, (2, 8))[:, dims.rope].mean(0)
    torch.testing.assert_close(start.rope_key, wanted, atol=1e-12, rtol=0)
    found = start.weights(16)
    torch.testing.assert_close(found["kv_a_proj_with_mqa.weight"][16:], wanted, atol=1e-12, rtol=0)


def test_pca_of_equal_heads_is_their_mean_and_of_others_keeps_more():
    same = drawn(1, 4, 32).expand(3, -1, -1)
    key = shared_key("pca", same, None)
    torch.testing.assert_close(key.key(same), same[0].double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(key.queries(6), torch.ones(6, 4, dtype=torch.float64), atol=1e-9, rtol=0)
    rows, covariance = drawn(3, 4, 32), torch.diag(torch.logspace(0, -3, 32, dtype=torch.float64))

    def lost(how):
        one = shared_key(how, rows, covariance)
        seen = one.key(rows)[None] * one.queries(3)[..., None]  # what each head's queries see in the place of its key
        return float(torch.einsum("grd,de,gre->", rows - seen, covariance, rows - seen))

    assert lost("pca") < lost("mean")


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=24), st.floats(0.01, 1), st.floats(0.01, 1))
@settings(max_examples=50, deadline=None)
def test_the_rank_of_an_energy_is_the_smallest_that_has_it(values, share, other):
    values = sorted(values, reverse=True)
    size = len(values)
    made = type(spectrum(torch.eye(1)))(torch.eye(size), torch.eye(size), torch.tensor(values, dtype=torch.float64))
    rank, energy = made.rank_of_energy(share), [v * v for v in values]
    assert sum(energy[:rank]) >= share * sum(energy) * (1 - 2e-6)
    assert rank == 1 or sum(energy[: rank - 1]) < share * sum(energy)
    low, high = sorted((share, other))
    assert made.rank_of_energy(low) <= made.rank_of_energy(high)
    assert made.rank_of_energy(1.0) <= size
    assert round_up(rank, 1000) % 8 == 0
    assert 0 <= round_up(rank, 1000) - rank < 8


LLAMA_1B, LLAMA_3B, LLAMA_8B = (
    TeacherShape(2048, 32, 8, 64),
    TeacherShape(3072, 24, 8, 128),
    TeacherShape(4096, 32, 8, 128),
)
SMOLLM_135M, SMOLLM_360M = TeacherShape(576, 9, 3, 64), TeacherShape(960, 15, 5, 64)
SMOLLM_1_7B = TeacherShape(2048, 32, 32, 64)


PUBLISHED = [
    (LLAMA_1B, 512, 32, 53.1), (LLAMA_1B, 256, 32, 28.1), (LLAMA_1B, 128, 32, 15.6), (LLAMA_1B, 64, 32, 9.38),
    (LLAMA_1B, 48, 32, 7.81), (LLAMA_1B, 512, 64, 56.3), (LLAMA_1B, 256, 64, 31.3), (LLAMA_1B, 128, 64, 18.8),
    (LLAMA_3B, 816, 64, 43.0), (LLAMA_3B, 448, 64, 25.0), (LLAMA_3B, 128, 64, 9.38), (LLAMA_3B, 96, 64, 7.81),
    (LLAMA_8B, 256, 64, 15.63), (LLAMA_8B, 160, 64, 10.94), (LLAMA_8B, 128, 64, 9.38),
    (SMOLLM_135M, 160, 32, 50), (SMOLLM_135M, 16, 32, 12.5), (SMOLLM_360M, 288, 32, 50), (SMOLLM_360M, 48, 32, 12.5),
    (SMOLLM_1_7B, 480, 32, 12.5), (SMOLLM_1_7B, 2016, 32, 50),
]  # fmt: skip
"""Spec section 5: teacher, r_kv, d_r, percent of the teacher's cache."""


@pytest.mark.parametrize(("teacher", "kv_rank", "rope_dim", "percent"), PUBLISHED)
def test_cache_ratios_are_those_of_the_published_table(teacher, kv_rank, rope_dim, percent):
    """Spec section 5: 2 n_kv d_h numbers per token and layer become r_kv + d_r."""
    layer = LatentShape(kv_rank, teacher.head_dim - rope_dim, rope_dim, teacher.head_dim)
    assert 100 * kv_ratio([layer] * 4, teacher) == pytest.approx(percent, rel=0.01, abs=0.05)
    if percent in (50, 12.5, 25.0):
        assert rank_for(percent / 100, teacher, rope_dim) == kv_rank


@pytest.mark.parametrize(("teacher", "kv_rank", "rope_dim", "percent"), PUBLISHED)
def test_decoding_keeps_the_published_share_of_bytes(teacher, kv_rank, rope_dim, percent):
    """Of both models' own caches, bytes per token in bfloat16; nothing is computed."""
    base = AutoConfig.for_model(
        "llama", hidden_size=teacher.hidden, num_attention_heads=teacher.heads, num_key_value_heads=teacher.kv_heads,
        head_dim=teacher.head_dim, intermediate_size=8, num_hidden_layers=2, vocab_size=8, rope_theta=10000.0,
    )  # fmt: skip
    rope = dict(base.rope_parameters)
    student = stock_config(base, kv_rank, teacher.head_dim - rope_dim, rope_dim, rope)
    with torch.device("meta"):
        whole, stock = (AutoModelForCausalLM.from_config(c, dtype=torch.bfloat16).eval() for c in (base, student))
    ids = torch.zeros(1, 4, dtype=torch.long)
    held, absorbed, base_held = (cache_bytes(model, ids) for model in (stock, absorb(stock), whole))
    assert held == absorbed == {"cache_bytes_per_token": 2 * 2 * (kv_rank + rope_dim), "state_bytes": 0}
    share = held["cache_bytes_per_token"] / base_held["cache_bytes_per_token"]
    assert 100 * share == pytest.approx(percent, rel=0.01, abs=0.05)


def test_layers_that_stay_count_whole():
    """Spec section 3: half of the layers converted at 512 + 32 leave 76.6 %."""
    layer = LatentShape(512, 32, 32, 64)
    assert kv_ratio([layer, None] * 8, LLAMA_1B) == pytest.approx(0.766, abs=1e-3)


@pytest.mark.parametrize(
    ("kv_rank", "rope_dim", "q_rank"),
    [(512, 32, 864), (256, 32, 1184), (128, 32, 1344), (64, 32, 1424), (48, 32, 1440), (512, 64, 480), (256, 64, 736), (128, 64, 864)],
)  # fmt: skip
def test_query_ranks_of_equal_parameters_are_the_authors(kv_rank, rope_dim, q_rank):
    """Spec 2.6: the ranks of all 1B models (d_n = 32 beside d_r = 32, d_n = 64 beside d_r = 64)."""
    assert parity_q_rank(LLAMA_1B, kv_rank, rope_dim, rope_dim) == q_rank
