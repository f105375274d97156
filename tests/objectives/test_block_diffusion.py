"""Spec invariants 7-10 and 14 of the NBDiff objective, and its loss against ten lines of dense code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt.config import resolve
from adapt.data.batch import Batch
from adapt.errors import UserError
from adapt.models import attention
from adapt.models.layout import Layout
from adapt.objectives.base import Facts, Models
from adapt.objectives.block_diffusion import (
    BlockDiffusion,
    BlockDiffusionConfig,
    Growth,
    ar_weight_at,
    block_size_at,
    draw_mask,
    fixed_t,
    stratified,
)
from adapt.objectives.next_token import NextToken
from tests import tiny
from tests.batches import packed

MASK = 3
FACTS = Facts(mask_token_id=MASK)


def objective(b: int, **config) -> BlockDiffusion:
    return BlockDiffusion(BlockDiffusionConfig(block_size=b, growth=None, **config), FACTS)


def total(model, goal, batches, step=0, counts=None):
    """The loss of several microbatches divided by their common count, as the training step does it."""
    prepared = [goal.prepare(b, seed=0, step=step) for b in batches]
    names = prepared[0].terms
    counts = counts or {n: sum(p.terms[n].count for p in prepared) for n in names}
    loss = 0.0
    for item in prepared:
        sums = goal(Models(model), item.inputs)
        loss = loss + sum(item.terms[n].weight * sums[n] / counts[n] for n in names)
    return loss


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def assert_same(a, b, atol=1e-12):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=0)


def test_loss_equals_a_plain_dense_reference():
    """Full logits over 2T, a dense boolean mask, explicit loops: the same number (float64)."""
    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    batch, b = packed([[21, 10], [5, 26]]), 4
    goal = objective(b, ar_weight=0.5)
    prepared = goal.prepare(batch, seed=0, step=0)
    sums = goal(Models(model), prepared.inputs)
    layout = Layout.noisy_then_clean(batch.doc_ids, batch.position_ids, batch.position_ids // b)
    model.set_attn_implementation("sdpa")
    ids, pos = prepared.inputs["input_ids"], prepared.inputs["position_ids"]
    logits = model(ids, position_ids=pos, attention_mask=layout.dense()[:, None]).logits
    length = batch.input_ids.shape[1]
    masked = ar = n = 0
    for row in range(2):
        for i in range(1, length):
            if batch.labels[row, i] == -100:
                continue
            n += 1
            ar += F.cross_entropy(logits[row, length + i - 1], batch.input_ids[row, i])
            if ids[row, i] == MASK:
                noisy = logits[row, i - 1].clone()
                noisy[MASK] = float("-inf")
                masked += F.cross_entropy(noisy, batch.input_ids[row, i])
    assert prepared.terms["masked"].count == prepared.terms["ar"].count == n
    torch.testing.assert_close(sums["masked"], masked, atol=1e-9, rtol=0)
    torch.testing.assert_close(sums["ar"], ar, atol=1e-9, rtol=0)


def test_block_size_one_is_weighted_ar_training():
    """Invariant 7: no masked term, no NaN, gradients = ar_weight x those of next-token training."""
    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    batch = packed([[9, 14]])
    loss = total(model, objective(1, ar_weight=0.5), [batch])
    plain = total(model, NextToken(Facts()), [batch])
    torch.testing.assert_close(loss, 0.5 * plain, atol=1e-13, rtol=0)
    assert_same(gradients(model, loss), [0.5 * g for g in gradients(model, plain)])


def test_dropping_the_empty_noisy_copy_changes_nothing():
    """With ar_weight and nothing masked, one stream gives the AR gradients of two."""
    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    batch = packed([[12, 7]])
    one = total(model, objective(1), [batch])
    layout = Layout.noisy_then_clean(batch.doc_ids, batch.position_ids, batch.position_ids)
    hidden = attention.hidden_states(model, batch.input_ids.repeat(1, 2), batch.position_ids.repeat(1, 2), layout)
    logits = model.lm_head(hidden[:, 19:])
    scored = batch.labels[0, 1:] != -100
    two = 0.5 * F.cross_entropy(logits[0, :-1][scored], batch.input_ids[0, 1:][scored])
    assert_same(gradients(model, one), gradients(model, two), atol=1e-11)


@settings(max_examples=10, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=4, max_size=4),
    b=st.sampled_from([2, 4, 8]),
)
def test_loss_is_invariant_to_the_microbatch_split(rows, b):
    """Invariant 8: one batch of four rows, or four of one, or two of two: the same loss and gradients."""
    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    batch = packed([*rows, [6, 6]])
    goal = objective(b)
    whole = total(model, goal, [batch])
    for size in (1, 2, 3):
        split = total(model, goal, [batch.rows(i, i + size) for i in range(0, 5, size)])
        torch.testing.assert_close(split, whole, atol=1e-12, rtol=0)
    reordered = Batch.cat([batch.rows(2, 5), batch.rows(0, 2)])
    torch.testing.assert_close(total(model, goal, [reordered]), whole, atol=1e-12, rtol=0)


def test_doubling_the_padding_changes_nothing():
    """Invariant 8, second half. The noise of real tokens must not depend on what follows them: t is drawn per block,
    so the comparison fixes it."""
    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    goal = fixed_t(BlockDiffusionConfig(), FACTS, 4, 1.0)
    short, long = packed([[15, 6]], pad=4), packed([[15, 6]], pad=8)
    long.input_ids[:, :25], long.labels[:, :25] = short.input_ids, short.labels
    assert_same(gradients(model, total(model, goal, [short])), gradients(model, total(model, goal, [long])), 1e-11)


@settings(max_examples=15, deadline=None)
@given(documents=st.lists(st.integers(1, 60), min_size=1, max_size=6), b=st.sampled_from([2, 4, 8, 32]))
def test_block_first_prompt_and_padding_are_never_masked(documents, b):
    """Invariant 9, first half."""
    batch = packed([documents], prompt=3, pad=5)
    prepared = objective(b).prepare(batch, seed=1, step=0)
    if prepared.inputs["input_ids"].shape[1] == batch.input_ids.shape[1]:
        return  # nothing was maskable
    masked = prepared.inputs["input_ids"][:, : batch.input_ids.shape[1]] == MASK
    assert not (masked & (batch.position_ids % b == 0)).any()
    assert not (masked & (batch.role != 2)).any()
    assert torch.equal(prepared.inputs["input_ids"][:, batch.input_ids.shape[1] :], batch.input_ids)


def test_masked_fraction_follows_t():
    """Invariant 9: E[masked] is p(t); over many rows the mean is 1/2, and per block it is uniform over [0, 1]."""
    batch = packed([[256]] * 200)
    block = batch.position_ids // 32
    everything = torch.ones_like(batch.input_ids, dtype=torch.bool)
    masked = draw_mask(batch, block, everything, 1e-3, seed=0)
    assert abs(masked.float().mean() - 0.5) < 0.01
    fractions = masked.view(200, 8, 32).float().mean(-1)
    quarters = torch.histc(fractions, 4, 0, 1) / fractions.numel()
    assert (quarters - 0.25).abs().max() < 0.04
    for t in (0.25, 0.75):
        assert abs(draw_mask(batch, block, everything, 1e-3, 0, t).float().mean() - t) < 0.01
    assert draw_mask(batch, block, everything, 1e-3, 0, 1.0).all()


def test_noise_is_stratified_within_a_row_in_random_order():
    import numpy as np

    orders = []
    for seed in range(50):
        u = stratified(8, np.random.default_rng(seed))
        shifted = np.sort(u)
        assert (np.diff(shifted) < 0.25 + 1e-9).all(), "two neighbours are at most two strata apart"
        orders.append(tuple(np.argsort(u)))
    assert len(set(orders)) > 40, "strata must not follow the position in the row"


def test_noise_depends_on_seed_epoch_and_sample_alone():
    """Row 3 of a large batch has the noise it has alone; another epoch, seed or sample has another."""
    batch = packed([[64]] * 5)
    block, every = batch.position_ids // 8, torch.ones_like(batch.input_ids, dtype=torch.bool)
    whole = draw_mask(batch, block, every, 1e-3, seed=4)
    alone = draw_mask(batch.rows(3, 4), block[3:4], every[3:4], 1e-3, seed=4)
    assert torch.equal(whole[3:4], alone)
    assert not torch.equal(whole[3], whole[2])
    assert not torch.equal(draw_mask(batch, block, every, 1e-3, seed=5)[3:4], alone)
    later = Batch(**{**vars(batch), "epoch": batch.epoch + 1})
    assert not torch.equal(draw_mask(later, block, every, 1e-3, seed=4)[3:4], alone)


def test_block_growth_schedule():
    """Invariant 10: values at the ends of plateaus, the cap, and before the schedule starts."""
    config = BlockDiffusionConfig(block_size=32, growth=Growth(start=1, factor=2, every=500, after=100))
    assert [block_size_at(config, s) for s in (0, 100, 599)] == [1, 1, 1]
    for k in range(1, 6):
        edge = 100 + k * 500
        assert (block_size_at(config, edge - 1), block_size_at(config, edge)) == (2 ** (k - 1), 2**k)
    assert block_size_at(config, 10**9) == 32
    odd = BlockDiffusionConfig(block_size=12, growth=Growth(start=2, factor=3, every=1))
    assert [block_size_at(odd, s) for s in range(4)] == [2, 6, 12, 12]
    goal = BlockDiffusion(config, FACTS)
    assert block_size_at(config, goal.largest_step()) == 32


def test_ar_weight_follows_the_blocks():
    config = BlockDiffusionConfig(block_size=16, growth=Growth(start=1, every=10), ar_weight=1.0, ar_weight_end=0.2)
    assert [round(ar_weight_at(config, s), 6) for s in (0, 10, 20, 30, 40, 99)] == [
        1.0,
        0.8,
        0.6,
        0.4,
        0.2,
        0.2,
    ]


def test_mask_token_gets_no_probability():
    """The mask token's logit counts as -inf: its output row receives no gradient from the masked term."""
    model = attention.use(tiny.tiny_model("mistral", dtype=torch.float64))  # untied head
    goal = objective(4, ar_weight=0.0)
    total(model, goal, [packed([[24]])]).backward()
    assert model.lm_head.weight.grad[MASK].abs().max() == 0
    assert model.lm_head.weight.grad[10].abs().max() > 0


RECIPE = {
    "run": {"name": "x"},
    "model": {"base": "somewhere", "conversions": ["mask_token"]},
    "data": {"train": [{"source": "text:corpus"}], "seq_len": 64},
    "objective": {"name": "block_diffusion", "block_size": 8, "growth": {"start": 2}},
    "optimizer": "adamw",
    "schedule": "cosine",
    "trainer": {"steps": 1, "batch_tokens": 64},
}


@pytest.mark.parametrize(
    "change, where",
    [
        ({"objective": {"name": "block_diffusion", "block_size": 128}}, "objective.block_size"),
        ({"objective": {"name": "block_diffusion", "ar_weight": 0.0}}, "objective.growth.start"),
        (
            {"objective": {"name": "block_diffusion", "block_size": 8, "growth": {"start": 16}}},
            "objective.growth.start",
        ),
        ({"objective": {"name": "block_diffusion", "epsilon": 1.5}}, "objective.epsilon"),
        ({"model": {"base": "somewhere"}}, "model.conversions"),
    ],
)
def test_impossible_settings_are_named(change, where):
    """Invariant 14, the objective's share of it."""
    recipe = resolve({**RECIPE, **change}).recipe
    assert where in [p.where for p in recipe.objective.config.problems(recipe)]
    good = resolve(RECIPE).recipe
    assert list(good.objective.config.problems(good)) == []


def test_unknown_key_of_the_objective_is_refused():
    with pytest.raises(UserError, match=r"objective\.blok_size.*block_size"):
        resolve({**RECIPE, "objective": {"name": "block_diffusion", "blok_size": 4}})
