"""The student and its mixers as transformers and our trainer use them (LAWCAT spec, invariants 4 to 10)."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softplus

from adapt.models import attention
from adapt.models.configuration_adapted import AdaptedConfig
from adapt.models.layout import Layout
from adapt.models.modeling_adapted import MIXERS as KNOWN
from adapt.models.modeling_adapted import AdaptedForCausalLM
from adapt.models.state_cache import StateLayer
from adapt.models.tokens import Tokens
from tests import tiny
from tests.models.linear import MIXERS, VARIANTS, ids, student

variants = pytest.mark.parametrize("variant", VARIANTS)


def logits(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).logits


@variants
def test_invariant_4_causal_with_convolutions(variant):
    """Bit for bit, across the borders of chunks."""
    model, x = student(*VARIANTS[variant], dtype=torch.float32), ids(1, 140)
    for at in (1, 63, 64, 65, 128):
        other = x.clone()
        other[0, at] = 4 + (x[0, at] - 3) % 316
        a, b = logits(model, x), logits(model, other)
        assert torch.equal(a[:, :at], b[:, :at])
        assert not torch.equal(a[:, at:], b[:, at:])


def test_invariant_5_the_first_heads_are_the_first_values():
    model = student()
    mixer = model.model.layers[0].self_attn
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    q, k, v = mixer.project(x)
    heads, _ = mixer.recurrence(x, q, k, v, None, Tokens(), None)
    torch.testing.assert_close(heads[:, 0], v[:, 0].repeat_interleave(2, 1), atol=1e-8, rtol=0)


@variants
@pytest.mark.parametrize("layers", [(0, 1), (1,)], ids=["all", "hybrid"])
@pytest.mark.parametrize("cuts", [(77,), (1, 2), (2, 3, 70), tuple(range(1, 21))], ids=["77", "1", "2", "each"])
def test_invariant_6_any_split_into_prefill_and_decoding(variant, layers, cuts):
    model, x = student(*VARIANTS[variant], layers=layers), ids(2, 80)
    cache, parts, start = None, [], 0
    with torch.no_grad():
        for stop in (*cuts, 80):
            if stop == start:
                continue
            out = model(x[:, start:stop], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, stop
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, x), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(("mixer", "options"), [("gated_linear", {"rope": "before_conv"}), ("mamba2", {})])
def test_a_long_prompt_in_pieces_is_the_same_prompt(mixer, options, monkeypatch):
    model, x = student(mixer, options), ids(2, 70)
    keep = (torch.arange(70) >= 5).long().expand(2, -1)
    expected = model(x, attention_mask=keep).logits.detach()  # with gradients: whole
    sizes, original = [], model.model.layers[0].self_attn.recurrence.forward
    monkeypatch.setattr("adapt.models.linear_mixer.PIECE", 16)
    monkeypatch.setattr(
        model.model.layers[0].self_attn.recurrence, "forward", lambda x, *a: sizes.append(x.shape[1]) or original(x, *a)
    )
    found = logits(model, x, attention_mask=keep)
    torch.testing.assert_close(found[:, 5:], expected[:, 5:], atol=1e-11, rtol=1e-11)
    assert sizes == [16, 16, 16, 16, 6]


@variants
@pytest.mark.parametrize("layers", [(0, 1), (1,)], ids=["all", "hybrid"])
def test_invariant_7_left_padding_is_deletion(variant, layers):
    model, x = student(*VARIANTS[variant], layers=layers), ids(1, 40)
    padded = torch.cat([ids(1, 13, seed=5), x], 1)
    keep = (torch.arange(53) >= 13).long()[None]
    positions = (keep.cumsum(1) - 1).clamp_min(0)
    found = logits(model, padded, attention_mask=keep, position_ids=positions)[:, 13:]
    torch.testing.assert_close(found, logits(model, x), atol=1e-11, rtol=1e-11)


@variants
def test_invariant_7_padding_anywhere_is_deletion(variant):
    """Convolutions skip it as well, and a padded piece may go on from a cache."""
    model, x = student(*VARIANTS[variant]), ids(1, 40)
    keep = torch.ones(60, dtype=torch.bool)
    keep[[0, 1, 7, 8, 9, 20, 33, 34, 35, 36, 37, 38, 45, 46, 50, 51, 52, 53, 54, 58]] = False
    padded = torch.full((1, 60), 9)
    padded[0, keep] = x[0]
    expected = logits(model, x)
    whole = logits(model, padded, attention_mask=keep.long()[None])
    torch.testing.assert_close(whole[:, keep], expected, atol=1e-11, rtol=1e-11)
    with torch.no_grad():
        first = model(padded[:, :35], attention_mask=keep[None, :35].long(), use_cache=True)
        rest = model(padded[:, 35:], attention_mask=keep[None].long(), past_key_values=first.past_key_values)
    found = torch.cat([first.logits, rest.logits], 1)
    torch.testing.assert_close(found[:, keep], expected, atol=1e-11, rtol=1e-11)


def test_invariant_7_a_mask_on_values_alone_would_not_do():
    """The bug this guards against: padding that counts in the denominator and decays."""
    model, x = student(), ids(1, 20)
    recurrence = model.model.layers[0].self_attn.recurrence
    hidden = torch.randn(1, 33, 32, dtype=torch.float64)
    q, k, v = model.model.layers[0].self_attn.project(hidden)
    keep = (torch.arange(33) >= 13)[None]
    right, _ = recurrence(hidden, q, k, v, None, Tokens(keep=keep), None)
    wrong, _ = recurrence(hidden, q, k, v * keep[..., None, None], None, Tokens(), None)
    assert (right - wrong)[:, 13:].abs().max() > 0.05
    assert x.shape == (1, 20)


@variants
@pytest.mark.parametrize("layers", [(0, 1), (0,)], ids=["all", "hybrid"])
@pytest.mark.parametrize("lengths", [[64, 10], [3, 2, 60, 1, 1, 7], [1, 1, 1, 71]], ids=str)
def test_invariant_8_packed_documents_are_separate_documents(variant, layers, lengths):
    """Through our attention's plan, as training runs it; padding at the end is documents of its own."""
    model, x = attention.use(student(*VARIANTS[variant], layers=layers)), ids(1, 74)
    doc = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    pos = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        found = attention.hidden_states(model, x, pos, Layout.causal(doc, pos))
        for number, n in enumerate(lengths):
            mine = x[doc == number][None]
            alone = model.model(mine, position_ids=torch.arange(n)[None], use_cache=False).last_hidden_state
            torch.testing.assert_close(found[:, doc[0] == number], alone, atol=1e-11, rtol=1e-11)


def test_rows_packed_without_a_mask_are_found_by_their_positions():
    model, x = student(layers=(0,)), ids(1, 30)
    positions = torch.cat([torch.arange(18), torch.arange(12)])[None]
    found = logits(model, x, position_ids=positions, use_cache=False)
    alone = logits(model, x[:, 18:], use_cache=False)
    torch.testing.assert_close(found[:, 18:], alone, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("mixer", MIXERS)
def test_invariant_9_the_state_does_not_grow(mixer):
    model = student(mixer)
    sizes = set()
    for length in (1, 23, 423):
        with torch.no_grad():
            cache = model(ids(1, length), use_cache=True).past_key_values
        assert all(isinstance(layer, StateLayer) for layer in cache.layers)
        assert cache.get_seq_length() == length
        sizes.add(sum(layer.numel() for layer in cache.layers))
    assert len(sizes) == 1


@pytest.mark.parametrize("mixer", MIXERS)
def test_states_are_float32_whatever_the_weights_are(mixer):
    model = student(mixer, dtype=torch.float32).to(torch.bfloat16)
    with torch.no_grad():
        cache = model(ids(1, 5), use_cache=True).past_key_values
    assert {state.dtype for layer in cache.layers for state in layer.states.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("variant", "family"), [("lawcat", f) for f in tiny.FAMILIES] + [(v, "llama") for v in VARIANTS if v != "lawcat"]
)
@pytest.mark.parametrize("layers", [(0, 1), (0,)], ids=["all", "hybrid"])
def test_invariant_10_generate_with_and_without_cache(variant, family, layers):
    model, x = student(*VARIANTS[variant], layers=layers, family=family, dtype=torch.float32), ids(2, 9)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(x, use_cache=True, **options)
    assert torch.equal(cached, model.generate(x, use_cache=False, **options))
    padded = torch.cat([torch.full((1, 4), 2), x[:1, :5]], 1)
    mask = (torch.arange(9) >= 4).long().expand(1, -1)
    both = model.generate(
        torch.cat([padded, x[1:]]), attention_mask=torch.cat([mask, torch.ones_like(mask)]), **options
    )
    assert torch.equal(both[0, 4:], model.generate(x[:1, :5], **options)[0])
    assert torch.equal(both[1], cached[1])


@pytest.mark.parametrize("layers", [(0, 1), (0,)], ids=["all", "hybrid"])
def test_beams_reorder_states(layers):
    model, x = student(layers=layers, dtype=torch.float32), ids(2, 9)
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(x, use_cache=True, **options), model.generate(x, use_cache=False, **options))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_student_without_converted_layers_is_its_base(family):
    base = tiny.tiny_model(family)
    model = AdaptedForCausalLM(AdaptedConfig.of(base.config, {}, {})).eval()
    model.load_state_dict(base.state_dict())
    assert torch.equal(logits(model, ids(2, 20)), logits(base, ids(2, 20)))


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointed in (False, True):
        model = student(dtype=torch.float32).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids(1, 30), labels=ids(1, 30), use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_a_dense_mask_is_refused_by_name():
    with pytest.raises(ValueError, match="4-D mask says nothing"):
        student()(ids(1, 6), attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))


def test_layer_maps_that_cannot_be_are_refused_by_name():
    config = tiny.tiny_config()
    with pytest.raises(ValueError, match="no token mixer is called 'hyena'"):
        AdaptedConfig.of(config, {0: "hyena"}, {})
    with pytest.raises(ValueError, match="token_mixers names 1 layers, but num_hidden_layers=2"):
        AdaptedConfig(num_hidden_layers=2, token_mixers=["attention"])
    with pytest.raises(ValueError, match="no blocks of the family 'gpt2'"):
        AdaptedForCausalLM(AdaptedConfig(base_model_type="gpt2"))
    with pytest.raises(TypeError, match="gat"):
        AdaptedForCausalLM(AdaptedConfig.of(config, {0: "gated_linear"}, {"gated_linear": {"gat": "head"}}))


def test_every_mixer_says_what_it_keeps_and_creates():
    """Those with a running state; latent attention keeps what attention keeps, in the model's own dtype."""
    assert {name for name, mixer in KNOWN.items() if hasattr(mixer, "created")} == set(MIXERS)
    for name in MIXERS:
        model, mixer = student(name), KNOWN[name]
        assert isinstance(model.model.layers[0].self_attn, mixer)
        assert mixer.created in model._keep_in_fp32_modules_strict
        model.model.layers[0].self_attn.get_submodule(mixer.created)


def test_mamba2_identity_is_decayed_linear_attention():
    """Spec section 7: without its norm the identity start is sum_i exp(-(t - i) ln2 / 1000) (q_t k_i) v_i."""
    model = AdaptedForCausalLM(
        AdaptedConfig.of(tiny.tiny_config(), {0: "mamba2"}, {"mamba2": {"norm": False}})
    ).double()
    mixer, x = model.model.layers[0].self_attn, torch.randn(1, 70, 32, dtype=torch.float64)
    q, k, v = (t.transpose(1, 2) for t in mixer.project(x))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    found, _ = mixer.recurrence(x, *mixer.project(x), None, Tokens(), None)
    steps = torch.arange(70)[:, None] - torch.arange(70)
    decay = torch.where(steps >= 0, 0.5 ** (steps / 1000.0), 0.0)
    torch.testing.assert_close(found.transpose(1, 2), (q @ k.mT * decay) @ v, atol=1e-6, rtol=1e-6)


def test_mamba2_is_the_published_recurrence():
    """Spec section 7, token by token, with every part on."""
    model = student("mamba2", {"init": "mamba_in_llama", "conv_silu": True})
    mixer = model.model.layers[0].self_attn
    m, x = mixer.recurrence, torch.randn(1, 12, 32, dtype=torch.float64)
    found, _ = m(x, *mixer.project(x), None, Tokens(), None)
    q, k, v = (t[0] for t in mixer.project(x))
    mixed = torch.cat([v.flatten(1), k.flatten(1), q.flatten(1)], 1)
    padded = torch.cat([mixed.new_zeros(3, mixed.shape[1]), mixed])
    mixed = sum(padded[j : j + 12] * m.conv.weight[:, 0, j] for j in range(4)) + m.conv.bias
    mixed = mixed * mixed.sigmoid()
    values, B, C = (t.unflatten(1, (-1, 8)) for t in mixed.split([16, 16, 32], 1))
    dt, z = softplus(x[0] @ m.dt_weight.T + m.dt_bias), x[0] @ m.z_weight.T + m.z_bias
    state = torch.zeros(4, 8, 8, dtype=torch.float64)
    for t in range(12):
        for h in range(4):
            value = values[t, h // 2]
            state[h] = (-m.A_log[h].exp() * dt[t, h]).exp() * state[h] + dt[t, h] * torch.outer(B[t, h // 2], value)
            y = C[t, h] @ state[h] + m.D[h] * value
            gate = z[t, 8 * h : 8 * h + 8]
            y = y * gate * gate.sigmoid()
            y = y / (y.square().mean() + 1e-5).sqrt() * m.norm[h]
            torch.testing.assert_close(found[0, t, h], y, atol=1e-12, rtol=1e-10)


def test_mamba2_keeps_the_last_inputs_of_its_convolution():
    """Not outputs, and not the first ones: a bug of two published implementations."""
    model = student("mamba2")
    mixer, x = model.model.layers[0].self_attn, torch.randn(1, 9, 32, dtype=torch.float64)
    q, k, v = mixer.project(x)
    _, states = mixer.recurrence(x, q, k, v, None, Tokens(), None)
    last = torch.cat([v.flatten(2), k.flatten(2), q.flatten(2)], 2)[:, -3:]
    assert torch.equal(states["tail"], last)
