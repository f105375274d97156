"""Latent attention: two forms of one function, a small cache, and the layouts of training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from adapt.models.attention import make_plan
from adapt.models.latent_attention import LatentAttention, LatentSpec, frequencies
from adapt.models.layout import Layout
from tests import tiny

SPEC = LatentSpec(
    hidden_size=32,
    num_heads=4,
    kv_rank=16,
    nope_dim=6,
    rope_dim=4,
    v_dim=8,
    rope={"rope_theta": 10000.0, "rope_type": "default"},
)
SPECS = {
    "plain": SPEC,
    "query-rank": replace(SPEC, q_rank=24, q_norm=True),
    "no-norms": replace(SPEC, q_rank=24, kv_norm=False),
    "biases": replace(SPEC, q_bias=True, kv_bias=True, o_bias=True),
    "wide-heads": replace(SPEC, nope_dim=8, rope_dim=8),  # d_n + d_r is not d_v
    "no-nope": replace(SPEC, nope_dim=0, rope_dim=8),
}


def layer(spec: LatentSpec = SPEC, index: int = 0) -> LatentAttention:
    torch.manual_seed(0)
    made = LatentAttention(spec, index).double().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(0, 0.3)
    return made


def states(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, length, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positions(rows: int, length: int) -> torch.Tensor:
    return torch.arange(length).expand(rows, -1)


@pytest.fixture(params=SPECS)
def spec(request) -> LatentSpec:
    return SPECS[request.param]


def pieces(made: LatentAttention, x: torch.Tensor, new: int):
    """Arguments of both forms: the last `new` tokens ask, all are in the cache."""
    s, caught = made.spec, {}
    cache = DynamicCache()
    made(x, positions(*x.shape[:2]), past_key_values=cache)
    latent, k_rope = cache.layers[0].keys, cache.layers[0].values
    generator = torch.Generator().manual_seed(3)
    shape = (x.shape[0], s.num_heads, new)
    caught["q_nope"] = torch.randn(*shape, s.nope_dim, dtype=torch.float64, generator=generator)
    caught["q_rope"] = torch.randn(*shape, s.rope_dim, dtype=torch.float64, generator=generator)
    return caught | {"latent": latent, "k_rope": k_rope}


def test_absorbed_equals_expanded(spec):
    """A token, a chunk with a mask of holes, and a whole row with none."""
    made, x = layer(spec), states(2, 9)
    holes = torch.rand(2, 1, 3, 9, generator=torch.Generator().manual_seed(5)) < 0.6
    holes[..., 0] = True
    for new, mask in ((1, None), (3, holes), (9, None)):
        given = pieces(made, x, new)
        expanded = made.expanded(**given, mask=mask)
        torch.testing.assert_close(made.absorbed(**given, mask=mask), expanded, atol=1e-12, rtol=0)
    additive = torch.zeros(2, 1, 3, 9, dtype=torch.float64).masked_fill(~holes, -1e30)
    given = pieces(made, x, 3)
    torch.testing.assert_close(
        made.absorbed(**given, mask=additive), made.absorbed(**given, mask=holes), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("chunks", [[1] * 10, [4, 1, 1, 4], [3, 7], [9, 1]])
def test_chunks_and_steps_equal_one_forward(spec, chunks):
    made, x = layer(spec), states(2, 10)
    whole = made(x, positions(2, 10))[0]
    cache, at, parts = DynamicCache(), 0, []
    for size in chunks:
        place = torch.arange(at, at + size)
        mask = (torch.arange(at + size) <= place[:, None])[None, None].expand(2, 1, -1, -1)
        parts.append(
            made(x[:, at : at + size], place.expand(2, -1), mask if at and size > 1 else None, past_key_values=cache)[0]
        )
        at += size
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=0)


def test_a_long_cache_is_read_in_the_absorbed_form(monkeypatch):
    """And a prompt in the expanded one, whose products are over heads."""
    made, calls = layer(), []
    for name in ("absorbed", "expanded"):
        form = getattr(made, name)
        monkeypatch.setattr(made, name, lambda *a, form=form, name=name, **k: calls.append(name) or form(*a, **k))
    cache = DynamicCache()
    made(states(1, 8), positions(1, 8), past_key_values=cache)
    made(states(1, 1), torch.tensor([[8]]), past_key_values=cache)
    made.train()(states(1, 8), positions(1, 8))
    assert calls == ["expanded", "absorbed", "expanded"]


def test_the_cache_holds_the_latent_and_one_key(spec):
    """Sum over layers of B S (r_kv + d_r) numbers, with ranks of their own; nothing per head."""
    ranks, cache = (16, 8, 24), DynamicCache()
    for index, rank in enumerate(ranks):
        layer(replace(spec, kv_rank=rank), index)(states(3, 7), positions(3, 7), past_key_values=cache)
    held = sum(t.numel() for one in cache.layers for t in (one.keys, one.values))
    assert held == sum(3 * 7 * (rank + spec.rope_dim) for rank in ranks)


def test_rows_padded_on_the_left_equal_rows_without_padding(spec):
    """In the prompt and in the steps after it."""
    made, x = layer(spec), states(1, 6)
    alone_cache, padded_cache = DynamicCache(), DynamicCache()
    alone = made(x[:, :5], positions(1, 5), past_key_values=alone_cache)[0]
    pad = 3
    padded = torch.cat([states(1, pad, seed=9), x], 1)
    real = torch.arange(pad + 6) >= pad
    causal = torch.ones(pad + 6, pad + 6, dtype=torch.bool).tril()
    mask = (causal & real)[None, None]
    place = (torch.arange(pad + 6) - pad).clamp_min(0)[None]
    length = pad + 5
    out = made(padded[:, :length], place[:, :length], mask[..., :length, :length], past_key_values=padded_cache)[0]
    torch.testing.assert_close(out[:, pad:], alone, atol=1e-12, rtol=0)
    step = made(padded[:, length:], place[:, length:], mask[..., length:, :], past_key_values=padded_cache)[0]
    wanted = made(x[:, 5:], torch.tensor([[5]]), past_key_values=alone_cache)[0]
    torch.testing.assert_close(step, wanted, atol=1e-12, rtol=0)
    assert bool(out.isfinite().all())


def test_packed_documents_equal_documents_alone(spec):
    """Through the plan of attention.py, gradients too."""
    made, x = layer(spec).train(), states(1, 12)
    doc = torch.tensor([[0] * 5 + [1] * 7])
    pos = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = x.clone().requires_grad_()
    out = made(packed, pos, plan=make_plan(Layout.causal(doc, pos), "tiled"))[0]
    alone = x.clone().requires_grad_()
    apart = torch.cat([made(alone[:, :5], pos[:, :5])[0], made(alone[:, 5:], pos[:, 5:])[0]], 1)
    torch.testing.assert_close(out, apart, atol=1e-12, rtol=0)
    out.square().sum().backward()
    apart.square().sum().backward()
    torch.testing.assert_close(packed.grad, alone.grad, atol=1e-10, rtol=0)


@pytest.mark.parametrize("q_rank", [None, 24])
def test_it_is_the_attention_of_deepseek_v3(q_rank):
    """Same parameters, same function as transformers' class, whose layout exports use."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    theirs_config = tiny_deepseek(q_rank)
    theirs = DeepseekV3Attention(theirs_config, 0).double().eval()
    ours = layer(replace(SPEC, q_rank=q_rank, q_norm=q_rank is not None))
    theirs.load_state_dict(ours.state_dict())
    x, place = states(2, 7), positions(2, 7)
    cos_sin = DeepseekV3RotaryEmbedding(theirs_config)(x, place)
    wanted = theirs(x, cos_sin, None)[0]
    torch.testing.assert_close(ours(x, place)[0], wanted, atol=1e-6, rtol=0)  # their angles are fp32 times fp64


def tiny_deepseek(q_rank):
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "deepseek_v3",
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=q_rank,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=8,
        rope_parameters=SPEC.rope,
    )
    config._attn_implementation = "sdpa"
    return config


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_frequencies_are_those_of_transformers(rope):
    config = tiny.tiny_config(head_dim=32, rope_parameters={"rope_theta": 500000.0, **rope})
    if rope["rope_type"] == "default":
        wanted = 500000.0 ** -(torch.arange(0, 32, 2) / 32)
    else:
        wanted = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")[0]
    torch.testing.assert_close(frequencies({"rope_theta": 500000.0, **rope}, 32), wanted, atol=0, rtol=1e-5)


YARN = {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize("over", [{}, {"mscale": 1.0, "mscale_all_dim": 0.0}, {"mscale": 0.7, "mscale_all_dim": 1.2}])
def test_yarn_is_that_of_the_stock_class(over):
    """Frequencies, the size of cos and sin, and the softmax scale: the layer is transformers' DeepseekV3Attention."""
    from transformers import AutoConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    made, x = layer(replace(SPEC, rope=YARN | over)), states(2, 9)
    config = AutoConfig.for_model(
        "deepseek_v3", hidden_size=32, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=None,
        qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8, max_position_embeddings=131072, rope_parameters=YARN | over,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    stock = DeepseekV3Attention(config, 0).double().eval()
    stock.load_state_dict(made.state_dict())
    place = torch.tensor([[0, 1, 2, 3, 50, 51, 3000, 9000, 90000]]).expand(2, -1)
    theirs = stock(x, DeepseekV3RotaryEmbedding(config)(x, place), None)[0]
    torch.testing.assert_close(made(x, place)[0], theirs, atol=1e-6, rtol=0)


def test_an_unknown_rope_is_refused():
    with pytest.raises(ValueError, match="dynamic"):
        frequencies({"rope_type": "dynamic", "rope_theta": 1e4}, 8)


def test_modules_have_deepseeks_shapes(spec):
    made = layer(spec)
    heads, per_query = spec.num_heads, spec.nope_dim + spec.rope_dim
    wanted = {
        "kv_a_proj_with_mqa": (spec.kv_rank + spec.rope_dim, 32),
        "kv_b_proj": (heads * (spec.nope_dim + spec.v_dim), spec.kv_rank),
        "o_proj": (32, heads * spec.v_dim),
    }
    if spec.q_rank is None:
        wanted |= {"q_proj": (heads * per_query, 32)}
    else:
        wanted |= {"q_a_proj": (spec.q_rank, 32), "q_b_proj": (heads * per_query, spec.q_rank)}
    found = {n: tuple(m.weight.shape) for n, m in made.named_children() if isinstance(m, nn.Linear)}
    assert found == wanted
