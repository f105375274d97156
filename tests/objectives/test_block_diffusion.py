"""Spec invariants 7-10 and 14 of the NBDiff objective, and its loss against ten lines of dense code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt.components import BlockSizesChoice
from adapt.config import decode, resolve
from adapt.data.batch import Batch
from adapt.errors import UserError
from adapt.models import attention
from adapt.models.layout import Layout
from adapt.objectives.base import Facts, Models
from adapt.objectives.block_diffusion import BlockDiffusion, BlockDiffusionConfig
from adapt.objectives.blocks import Blocks
from adapt.objectives.masking import Noise, draw, stratified
from adapt.objectives.next_token import NextToken
from adapt.train.validate import selections
from tests import tiny
from tests.batches import packed

MASK = 3
FACTS = Facts(mask_token_id=MASK)


def growing(name: str, **fields) -> BlockSizesChoice:
    return decode({"name": name, **fields}, BlockSizesChoice)


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


@pytest.mark.parametrize("noise", [Noise(), Noise(complementary=True), Noise(t_min=1.0)])
def test_a_mask_token_in_the_text_is_never_a_target(noise):
    """Its logit is excluded, so its loss would be infinite; it counts for neither term."""
    batch = packed([[24, 8]])
    batch.input_ids[0, 5:30:3] = batch.labels[0, 5:30:3] = MASK
    goal = objective(8, block_first="noisy", noise=noise)
    prepared = goal.prepare(batch, seed=0, step=0)
    for term in ("masked", "ar"):
        assert MASK not in prepared.inputs[f"{term}/target"]
        assert len(prepared.inputs[f"{term}/target"])
    learned = int(((batch.labels != -100) & (batch.labels != MASK)).sum())
    assert prepared.terms["ar"].count == learned
    sums = goal(Models(attention.use(tiny.tiny_model())), prepared.inputs)
    assert all(torch.isfinite(s) for s in sums.values())


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
    """Invariant 8, second half: nor the noise of real tokens, whose strata padding must not take part in."""
    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    goal = objective(4)
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
    assert not (masked & Blocks.of(batch, b, "response", 0).first).any()
    assert not (masked & (batch.role != 2)).any()
    assert torch.equal(prepared.inputs["input_ids"][:, batch.input_ids.shape[1] :], batch.input_ids)


def draws(batch, b, seed, t=None, maskable=None, **noise):
    every = torch.ones_like(batch.input_ids, dtype=torch.bool) if maskable is None else maskable
    return draw(batch, Blocks.of(batch, b, "zero", seed), every, Noise(**noise), seed, t).hidden


def test_masked_fraction_follows_t():
    """Invariant 9: E[masked] is p(t); over many rows the mean is 1/2, and per block it is uniform over [0, 1]."""
    batch = packed([[256]] * 200)
    masked = draws(batch, 32, 0)
    assert abs(masked.float().mean() - 0.5) < 0.01
    fractions = masked.view(200, 8, 32).float().mean(-1)
    quarters = torch.histc(fractions, 4, 0, 1) / fractions.numel()
    assert (quarters - 0.25).abs().max() < 0.04
    for t in (0.25, 0.75):
        assert abs(draws(batch, 32, 0, t).float().mean() - t) < 0.01
    assert draws(batch, 32, 0, 1.0).all()


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
    whole, alone = draws(batch, 8, 4), draws(batch.rows(3, 4), 8, 4)
    assert torch.equal(whole[3:4], alone)
    assert not torch.equal(whole[3], whole[2])
    assert not torch.equal(draws(batch, 8, 5)[3:4], alone)
    later = Batch(**{**vars(batch), "epoch": batch.epoch + 1})
    assert not torch.equal(draws(later, 8, 4)[3:4], alone)


def test_block_growth_schedule():
    """Invariant 10: values at the ends of plateaus, the cap, and before the schedule starts."""
    config = BlockDiffusionConfig(block_size=32, growth=growing("geometric", every=500, after=100))
    assert [config.size_at(s) for s in (0, 100, 599)] == [1, 1, 1]
    for k in range(1, 6):
        edge = 100 + k * 500
        assert (config.size_at(edge - 1), config.size_at(edge)) == (2 ** (k - 1), 2**k)
    assert config.size_at(10**9) == 32
    odd = BlockDiffusionConfig(block_size=12, growth=growing("geometric", start=2, factor=3, every=1))
    assert [odd.size_at(s) for s in range(4)] == [2, 6, 12, 12]


def test_published_growth_schedules():
    """I-DLM's 1, 2, 3; LLaDA2.0's up and down again; Fast-dVLM's sqrt(progress)."""
    idlm = BlockDiffusionConfig(block_size=3, growth=growing("plateaus", sizes=[1, 2, 3], steps=[0, 10, 20]))
    assert [idlm.size_at(s) for s in (0, 9, 10, 19, 20, 99)] == [1, 1, 2, 2, 3, 3]
    llada = BlockDiffusionConfig(block_size=32, growth=growing("plateaus", sizes=[1, 4, 64, 32], steps=[0, 5, 9, 30]))
    assert [llada.size_at(s) for s in (4, 5, 29, 30)] == [1, 4, 64, 32]
    root = BlockDiffusionConfig(block_size=32, growth=growing("sqrt", over=1600))
    assert [root.size_at(s) for s in (0, 99, 100, 399, 400, 899, 900, 1600, 9999)] == [4, 4, 8, 8, 16, 16, 32, 32, 32]
    for config, largest in ((idlm, 3), (llada, 64), (root, 32)):
        assert config.size_at(BlockDiffusion(config, FACTS).largest_step()) == largest


def test_ar_weight_follows_the_blocks():
    growth = growing("geometric", every=10)
    config = BlockDiffusionConfig(block_size=16, growth=growth, ar_weight=1.0, ar_weight_end=0.2)
    weights = [round(config.ar_weight_at(s), 6) for s in (0, 10, 20, 30, 40, 99)]
    assert weights == [1.0, 0.8, 0.6, 0.4, 0.2, 0.2]


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
    "objective": {"name": "block_diffusion", "block_size": 8, "growth": {"name": "geometric", "start": 2}},
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
            {"objective": {"name": "block_diffusion", "block_size": 8, "growth": {"name": "geometric", "start": 16}}},
            "objective.growth.start",
        ),
        ({"objective": {"name": "block_diffusion", "noise": {"epsilon": 1.5}}}, "objective.noise.epsilon"),
        ({"objective": {"name": "block_diffusion", "noise": {"t_min": 0.9, "t_max": 0.1}}}, "objective.noise.t_min"),
        ({"objective": {"name": "block_diffusion", "noise": {"search": True}}}, "objective.noise.search"),
        ({"objective": {"name": "block_diffusion", "context": "block"}}, "objective.ar_weight"),
        ({"objective": {"name": "block_diffusion", "block_size": None}}, "objective.growth"),
        ({"objective": {"name": "block_diffusion", "annealed": 5}}, "objective.annealed"),
        (
            {"objective": {"name": "block_diffusion", "growth": None, "annealed": 5, "context": "block"}},
            "objective.annealed",
        ),
        (
            {"objective": {"name": "block_diffusion", "weighting": "elbo", "noise": {"complementary": True}}},
            "objective.weighting",
        ),
        ({"model": {"base": "somewhere"}}, "model.conversions"),
    ],
)
def test_impossible_settings_are_named(change, where):
    """Invariant 14, the objective's share of it."""
    recipe = resolve({**RECIPE, **change}).recipe
    assert where in [p.where for p in problems(recipe)]
    assert problems(resolve(RECIPE).recipe) == []


def problems(recipe):
    return [
        p
        for _, choice in selections(recipe)
        if hasattr(choice.config, "problems")
        for p in choice.config.problems(recipe)
    ]


def test_unknown_key_of_the_objective_is_refused():
    with pytest.raises(UserError, match=r"objective\.blok_size.*block_size"):
        resolve({**RECIPE, "objective": {"name": "block_diffusion", "blok_size": 4}})
