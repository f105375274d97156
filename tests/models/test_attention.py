"""The layout's predicate against the words of the spec, and both ways of computing it against a dense mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt.models import attention
from adapt.models.layout import Layout
from tests import tiny
from tests.batches import packed

DOCUMENTS = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def spec_mask(doc, pos, b, clean_blocks=False, noisy_causal=False):
    """Spec §1's table, by loops: [2T, 2T], noisy copy first."""
    length = len(doc)
    mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for q in range(2 * length):
        for k in range(2 * length):
            i, j, q_noisy, k_noisy = q % length, k % length, q < length, k < length
            if doc[i] != doc[j]:
                continue
            same, before = pos[i] // b == pos[j] // b, pos[j] // b < pos[i] // b
            if q_noisy and k_noisy:
                mask[q, k] = same and (not noisy_causal or pos[j] <= pos[i])
            elif q_noisy:
                mask[q, k] = before
            elif not k_noisy:
                mask[q, k] = (before or same) if clean_blocks else pos[j] <= pos[i]
    return mask


@settings(max_examples=20, deadline=None)
@given(
    documents=DOCUMENTS,
    b=st.sampled_from([1, 2, 4, 8, 32]),
    clean_blocks=st.booleans(),
    noisy_causal=st.booleans(),
)
def test_predicate_is_the_specs_table(documents, b, clean_blocks, noisy_causal):
    batch = packed([documents])
    layout = Layout.noisy_then_clean(
        batch.doc_ids,
        batch.position_ids,
        batch.position_ids // b,
        clean_blocks=clean_blocks,
        noisy_causal=noisy_causal,
    )
    expected = spec_mask(batch.doc_ids[0], batch.position_ids[0], b, clean_blocks, noisy_causal)
    assert torch.equal(layout.dense()[0], expected)
    assert layout.dense().any(-1).all(), "a query without any key would give NaN"


@settings(max_examples=8, deadline=None)
@given(documents=st.lists(st.integers(1, 150), min_size=1, max_size=4), b=st.sampled_from([1, 4, 32]))
def test_tiles_equal_the_dense_mask_gradients_included(documents, b):
    batch = packed([documents, documents[::-1]], pad=3)
    layout = Layout.noisy_then_clean(batch.doc_ids, batch.position_ids, batch.position_ids // b)
    torch.manual_seed(0)
    q = torch.randn(2, 6, layout.doc.shape[1], 8, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(2, 2, layout.doc.shape[1], 8, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    weight = torch.randn(2, layout.doc.shape[1], 6, 8, dtype=torch.float64)
    tiled, _ = attention.attention(
        None, q, k, v, None, scaling=0.3, plan=attention.make_plan(layout, "tiled")
    )
    dense = F.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), attn_mask=layout.dense()[:, None], scale=0.3
    ).transpose(1, 2)
    torch.testing.assert_close(tiled, dense, atol=1e-12, rtol=0)
    ours = torch.autograd.grad((tiled * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((dense * weight).sum(), (q, k, v))
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e, atol=1e-12, rtol=0)


def test_tiles_never_hold_the_dense_mask():
    batch = packed([[1024]])
    layout = Layout.noisy_then_clean(batch.doc_ids, batch.position_ids, batch.position_ids // 8)
    plan = attention.make_plan(layout, "tiled")
    held = sum(t.mask.numel() for t in plan.rows[0] if t.mask is not None)
    assert held < 0.35 * 2048**2
    assert max(t.mask.numel() for t in plan.rows[0] if t.mask is not None) <= 128 * 2048


def test_flex_equals_sdpa_on_cpu():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch = packed([[70, 58], [128]])
    layout = Layout.noisy_then_clean(batch.doc_ids, batch.position_ids, batch.position_ids // 4)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 256, 16) for _ in range(3))
    blocks = create_block_mask(lambda b, h, i, j: layout.visible(b, i, j), 2, None, 256, 256, device="cpu")
    flex = flex_attention(q, k, v, block_mask=blocks)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.dense()[:, None])
    torch.testing.assert_close(flex, dense, atol=1e-5, rtol=0)  # fp32 sums in another order


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_without_a_plan_the_model_is_unchanged(family):
    """Registering our attention changes no logit of ordinary use, padding and cache included."""
    model = tiny.tiny_model(family)
    ids = torch.randint(4, 320, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        attention.use(model)
        after = model(ids, attention_mask=mask).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_clean_stream_is_the_plain_ar_forward(family):
    """Spec invariant 1: whatever stands in the noisy copy, the clean copy's states are the AR model's (float64)."""
    model = attention.use(tiny.tiny_model(family, dtype=torch.float64))
    batch = packed([[29]])
    with torch.no_grad():
        plain = model.model(batch.input_ids).last_hidden_state
        for b in (1, 2, 8, 32):
            noise = torch.full_like(batch.input_ids, 3)
            layout = Layout.noisy_then_clean(batch.doc_ids, batch.position_ids, batch.position_ids // b)
            ids, pos = torch.cat([noise, batch.input_ids], 1), batch.position_ids.repeat(1, 2)
            clean = attention.hidden_states(model, ids, pos, layout)[:, 29:]
            torch.testing.assert_close(clean, plain, atol=1e-13, rtol=0)
            if b > 1:
                blocky = Layout.noisy_then_clean(
                    batch.doc_ids, batch.position_ids, batch.position_ids // b, clean_blocks=True
                )
                other = attention.hidden_states(model, ids, pos, blocky)[:, 29:]
                assert (other - plain).abs().max() > 1e-3


def test_noisy_stream_limits():
    """Spec invariant 2: b=1 and x~=x gives the AR states; b >= document length gives the bidirectional forward."""
    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    batch = packed([[17]])
    ids, pos = batch.input_ids.repeat(1, 2), batch.position_ids.repeat(1, 2)
    with torch.no_grad():
        plain = model.model(batch.input_ids).last_hidden_state
        everything = torch.ones(1, 1, 17, 17, dtype=torch.bool)
        full = model.model(batch.input_ids, attention_mask=everything).last_hidden_state
        for b, expected in ((1, plain), (17, full), (32, full)):
            layout = Layout.noisy_then_clean(batch.doc_ids, batch.position_ids, batch.position_ids // b)
            noisy = attention.hidden_states(model, ids, pos, layout)[:, :17]
            torch.testing.assert_close(noisy, expected, atol=1e-13, rtol=0)


def test_leak_by_gradient():
    """Spec invariant 3: a noisy slot depends exactly on its noisy block and the clean tokens of earlier blocks."""
    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    b, length = 4, 14
    batch = packed([[length]])
    layout = Layout.noisy_then_clean(batch.doc_ids, batch.position_ids, batch.position_ids // b)
    embedded = model.model.embed_tokens(batch.input_ids.repeat(1, 2)).detach().requires_grad_()
    hidden = model.model(
        inputs_embeds=embedded,
        position_ids=batch.position_ids.repeat(1, 2),
        attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool),
        plan=attention.make_plan(layout),
    ).last_hidden_state
    for i in range(2 * length):
        (gradient,) = torch.autograd.grad(hidden[0, i].sum(), embedded, retain_graph=True)
        touched = set(gradient[0].abs().sum(-1).nonzero().flatten().tolist())
        if i < length:
            block = i // b
            expected = {j for j in range(length) if j // b == block} | {length + j for j in range(block * b)}
        else:
            expected = {length + j for j in range(i - length + 1)}
        assert touched == expected, i


def test_packed_rows_equal_separate_documents():
    """Spec invariant 6, partial final blocks included."""
    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    lengths, b = [13, 7, 1, 10], 4
    batch = packed([lengths])
    noise = torch.where(batch.position_ids % 3 == 1, 3, batch.input_ids)

    def states(doc, pos, noisy, clean):
        layout = Layout.noisy_then_clean(doc, pos, pos // b)
        return attention.hidden_states(model, torch.cat([noisy, clean], 1), torch.cat([pos, pos], 1), layout)

    with torch.no_grad():
        together = states(batch.doc_ids, batch.position_ids, noise, batch.input_ids)
        start, width = 0, sum(lengths)
        for length in lengths:
            span = slice(start, start + length)
            args = (x[:, span] for x in (batch.doc_ids, batch.position_ids, noise, batch.input_ids))
            alone = states(*args)
            torch.testing.assert_close(together[:, span], alone[:, :length], atol=1e-13, rtol=0)
            clean = together[:, width + start : width + start + length]
            torch.testing.assert_close(clean, alone[:, length:], atol=1e-13, rtol=0)
            start += length
