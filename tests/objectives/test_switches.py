"""The switches away from NBDiff: each against ten lines of dense code or the property it exists for."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt.models import attention
from adapt.objectives.base import Facts, Models
from adapt.objectives.block_diffusion import BlockDiffusion, BlockDiffusionConfig
from adapt.objectives.blocks import Blocks
from adapt.objectives.masking import Noise, draw
from tests import tiny
from tests.batches import packed

MASK = 3
FACTS = Facts(mask_token_id=MASK)
KINDS = [
    {},
    {"prediction": "inplace"},
    {"prediction": "inplace", "block_first": "noisy"},
    {"block_first": "noisy"},
    {"context": "block", "ar_weight": 0.0},
    {"context": "block", "ar_weight": 0.0, "prediction": "inplace", "block_first": "noisy", "weighting": "elbo"},
    {"noisy_attention": "causal", "noise": Noise(t_min=1.0, t_max=1.0)},
    {"noise": Noise(complementary=True), "block_first": "noisy"},
    {"noise": Noise(complementary=True), "normalizer": "masked", "ar_weight": 0.0, "context": "block"},
    {"annealed": 4},
    {"phase": "random"},
    {"block_size": None, "ar_weight": 0.0, "prediction": "inplace", "block_first": "noisy", "weighting": "elbo"},
    {"block_size": None, "ar_weight": 0.3},
]


def objective(**over) -> BlockDiffusion:
    return BlockDiffusion(BlockDiffusionConfig(**{"block_size": 4, "growth": None, **over}), FACTS)


def split(prepared, batch):
    """The noisy copies [view, B, T] of a prepared batch, without the clean one."""
    length = batch.input_ids.shape[1]
    copies = prepared.inputs["input_ids"].split(length, 1)
    streams = prepared.inputs["layout"].stream[0, ::length].tolist()
    return [c for c, s in zip(copies, streams, strict=True) if s > 0], streams


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: ",".join(k) or "nbdiff")
def test_loss_equals_dense_full_logits(kind):
    """Full logits, dense boolean mask, one token at a time (float64): every combination the presets use."""
    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    batch = packed([[21, 10], [5, 26]], prompt=2)
    goal = objective(**kind)
    config = goal.config
    prepared = goal.prepare(batch, seed=0, step=2)
    sums = goal(Models(model), prepared.inputs)
    noisy, streams = split(prepared, batch)
    model.set_attn_implementation("sdpa")
    mask = prepared.inputs["layout"].dense()[:, None]
    ids, positions = prepared.inputs["input_ids"], prepared.inputs["position_ids"]
    logits = model(ids, position_ids=positions, attention_mask=mask).logits.split(batch.input_ids.shape[1], 1)
    blocks = Blocks.of(batch, config.block_size, config.phase, 0)
    hideable = goal.hideable(batch, blocks)
    views = [draw(batch, blocks, hideable, config.noise, 0)]
    if config.noise.complementary:
        views.append(views[0].complement(hideable))
    masked, hidden = 0.0, 0
    for view, copy, out in zip(views, noisy, logits, strict=False):
        for row, i in (batch.labels != -100).nonzero().tolist():
            assert bool(copy[row, i] == MASK) == bool(view.hidden[row, i])
            if copy[row, i] != MASK:
                continue
            scores = out[row, i - (config.prediction == "shifted")].clone()
            scores[MASK] = float("-inf")
            weight = 1 / float(view.probability[row, i]) if config.weighting == "elbo" else 1.0
            masked, hidden = masked + weight * F.cross_entropy(scores, batch.input_ids[row, i]), hidden + 1
    torch.testing.assert_close(sums["masked"], torch.as_tensor(masked), atol=1e-9, rtol=1e-7)  # weights are float32
    supervised = int((batch.labels != -100).sum())
    expected = hidden if config.normalizer == "masked" else len(views) * supervised
    assert prepared.terms["masked"].count == expected
    if config.ar_weight:
        clean = logits[streams.index(0)][:, :-1]
        ar = F.cross_entropy(clean.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
        torch.testing.assert_close(sums["ar"], ar, atol=1e-9, rtol=0)
        assert prepared.terms["ar"].count == supervised


@settings(max_examples=20, deadline=None)
@given(
    documents=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    b=st.sampled_from([1, 2, 5, 8]),
    prompt=st.integers(0, 6),
    phase=st.sampled_from(["zero", "random", "response"]),
)
def test_blocks(documents, b, prompt, phase):
    """No block crosses a document; all but the ends of a document (and of a prompt) are whole; `response` starts a
    block at the first learned token, `zero` at multiples of b, `random` at one offset per document."""
    batch = packed([documents], prompt=prompt)
    blocks = Blocks.of(batch, b, phase, 5)
    number, first = blocks.number[0], blocks.first[0]
    assert torch.equal(number, first.long().cumsum(0))
    for doc in batch.doc_ids[0].unique():
        where = batch.doc_ids[0] == doc
        starts = batch.position_ids[0, where & first].tolist()
        length = int(where.sum())
        assert starts[0] == 0
        inner = [y - x for x, y in itertools.pairwise([*starts, length])]
        assert max(inner) <= b
        if phase == "zero":
            assert starts == list(range(0, length, b))
        if phase == "response":
            given = min(prompt, length)
            assert starts == sorted({*range(0, given, b), *range(given, length, b)})
        if phase == "random":
            assert all(size == b for size in inner[1:-1])


def test_random_phase_reaches_every_offset_and_follows_the_sample():
    batch = packed([[20, 20]] * 60)
    starts = Blocks.of(batch, 4, "random", 0).first
    offsets = [row[1:20].nonzero()[0].item() for row in starts]
    assert set(offsets) == {0, 1, 2, 3}
    assert torch.equal(Blocks.of(batch.rows(7, 8), 4, "random", 0).first, starts[7:8])
    assert not torch.equal(starts[:, :20], starts[:, 20:]), "documents of a row have phases of their own"


def test_complementary_views_hide_each_eligible_token_once():
    """Invariant 9, last part."""
    batch = packed([[33, 12], [40, 5]], prompt=3, pad=4)
    goal = objective(noise=Noise(complementary=True), block_first="noisy")
    prepared = goal.prepare(batch, seed=0, step=0)
    (a, b), streams = split(prepared, batch)
    assert streams == [1, 2, 0]
    eligible = batch.labels != -100
    assert torch.equal((a == MASK).long() + (b == MASK).long(), eligible.long())
    assert prepared.terms["masked"].count == 2 * prepared.terms["ar"].count == 2 * int(eligible.sum())


def test_views_do_not_see_each_other():
    """Changing the second noisy copy changes no output of the first."""
    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    batch = packed([[16]])
    inputs = objective(noise=Noise(complementary=True)).prepare(batch, seed=0, step=0).inputs
    changed = inputs["input_ids"].clone()
    changed[:, 16:32] = 9
    with torch.no_grad():
        one, two = (
            attention.hidden_states(model, ids, inputs["position_ids"], inputs["layout"])
            for ids in (inputs["input_ids"], changed)
        )
    assert torch.equal(one[:, :16], two[:, :16])
    assert torch.equal(one[:, 32:], two[:, 32:])
    assert not torch.equal(one[:, 16:32], two[:, 16:32])


@pytest.mark.parametrize("granularity, groups", [("block", 8), ("document", 2), ("row", 1)])
def test_granularity_of_t(granularity, groups):
    """As many values of the masking probability as there are blocks, documents or rows; each within the clip."""
    batch = packed([[16, 16]] * 3)
    noise = Noise(granularity=granularity, t_min=0.3, t_max=0.8)
    mask = draw(batch, Blocks.of(batch, 4, "zero", 0), torch.ones_like(batch.labels, dtype=torch.bool), noise, 0)
    assert [len(row.unique()) for row in mask.probability] == [groups] * 3
    assert 0.3 <= mask.probability.min() <= mask.probability.max() <= 0.8 + 1e-3


def test_whole_document_needs_no_clean_copy():
    """LLaDA and Dream as the limit of one block: a noisy copy alone, bidirectional within its document."""
    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    batch = packed([[14, 9]])
    goal = objective(block_size=None, ar_weight=0.0, prediction="inplace", block_first="noisy")
    inputs = goal.prepare(batch, seed=0, step=0).inputs
    assert inputs["input_ids"].shape == batch.input_ids.shape
    with torch.no_grad():
        packed_row = attention.hidden_states(model, inputs["input_ids"], inputs["position_ids"], inputs["layout"])
        model.set_attn_implementation("sdpa")
        for start, stop in ((0, 14), (14, 23)):
            ids = inputs["input_ids"][:, start:stop]
            every = torch.ones(1, 1, stop - start, stop - start, dtype=torch.bool)
            alone = model.model(ids, attention_mask=every).last_hidden_state
            torch.testing.assert_close(packed_row[:, start:stop], alone, atol=1e-12, rtol=0)


def test_annealed_mask_goes_from_block_size_one_to_the_target():
    batch = packed([[24]])
    goal = objective(annealed=10, noise=Noise(t_min=1.0, t_max=1.0))
    fine = [goal.prepare(batch, seed=0, step=s).inputs["layout"].fine[0, :24].sum().item() for s in (0, 5, 10, 99)]
    assert fine[0] == 24
    assert 0 < fine[1] < 24
    assert fine[2:] == [0, 0]
    dense = goal.prepare(batch, seed=0, step=5).inputs["layout"].dense()[0]
    noisy = dense[:24].view(24, 2, 24)
    assert noisy.sum(1).max() == 1, "no position is seen twice, in the noisy and the clean copy"
    plain = objective().prepare(batch, seed=0, step=0).inputs["layout"].dense()[0]
    assert torch.equal(goal.prepare(batch, seed=0, step=10).inputs["layout"].dense()[0], plain)


@pytest.mark.parametrize("prediction", ["shifted", "inplace"])
def test_elbo_weights_estimate_the_integral_over_t(prediction):
    """Invariant 11: the mean of the weighted loss over many draws is the sum over all 2^n masks of a block, each with
    its weight integrated over the masking probability, Beta(m, n - m + 1)."""
    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    batch = packed([[4]])
    goal = objective(prediction=prediction, block_first="noisy", weighting="elbo", ar_weight=0.0)
    model.set_attn_implementation("sdpa")
    ids = batch.input_ids[0]
    n, losses = 3, {}
    for pattern in itertools.product([False, True], repeat=n):  # the document's first token is never hidden
        hidden = torch.tensor([False, *pattern])
        noisy = torch.where(hidden, MASK, ids)
        with torch.no_grad():
            logits = model(noisy[None], attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool)).logits[0]
        logits[:, MASK] = float("-inf")
        where = hidden.nonzero()[:, 0]
        source = where - 1 if prediction == "shifted" else where
        losses[pattern] = float(F.cross_entropy(logits[source], ids[where], reduction="sum")) if len(where) else 0.0
    p = torch.linspace(goal.config.noise.epsilon, 1, 4001, dtype=torch.float64)
    exact = {
        low: sum(
            loss * float(torch.trapezoid((p ** (m - 1) * (1 - p) ** (n - m))[p >= low], p[p >= low])) / (1 - low)
            for pattern, loss in losses.items()
            if (m := sum(pattern))
        )
        for low in (0.0, 0.25)
    }
    beta = sum(math.gamma(m) * math.gamma(n - m + 1) / math.gamma(n + 1) * losses[k] for k in losses if (m := sum(k)))
    assert exact[0.0] == pytest.approx(beta, rel=0.01), "the integral over t is Beta(m, n - m + 1) per mask"
    clipped = dataclasses.replace(goal.config, noise=Noise(t_min=0.25))  # weights up to 4: few draws suffice
    goal, total, count = BlockDiffusion(clipped, FACTS), 0.0, 4000
    for sample in range(count):
        batch.sample_index[0] = sample
        prepared = goal.prepare(batch, seed=1, step=0)
        pattern = tuple((prepared.inputs["input_ids"][0, 1:4] == MASK).tolist())
        if any(pattern):
            total += losses[pattern] * float(prepared.inputs["masked/weight"][0])
    assert total / count == pytest.approx(exact[0.25], rel=0.03)


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    b=st.sampled_from([1, 2, 4, 8, 32]),
    prompt=st.integers(0, 9),
    phase=st.sampled_from(["zero", "random", "response"]),
    context=st.sampled_from(["causal", "block"]),
    complementary=st.booleans(),
)
def test_who_sees_whom(documents, b, prompt, phase, context, complementary):
    """Invariants 3 and 6 for every phase and prompt: a noisy slot sees its own block of its own copy and clean tokens of
    earlier blocks, never clean text it should predict; a clean token never a noisy one; nobody another document."""
    batch = packed([documents], prompt=prompt, pad=2)
    goal = objective(
        block_size=b, phase=phase, context=context, ar_weight=0.0, block_first="noisy",
        noise=Noise(complementary=complementary, t_min=1.0),
    )  # fmt: skip
    layout = goal.prepare(batch, seed=3, step=0).inputs["layout"]
    number = Blocks.of(batch, b, phase, 3).number[0].tolist()
    doc, pos, length = batch.doc_ids[0].tolist(), batch.position_ids[0].tolist(), batch.input_ids.shape[1]
    dense, streams = layout.dense()[0], layout.stream[0].tolist()
    for q in range(dense.shape[0]):
        i = q % length
        for k in range(dense.shape[1]):
            j = k % length
            if doc[i] != doc[j]:
                expected = False
            elif streams[q]:
                same = streams[k] == streams[q] and number[j] == number[i]
                expected = same or (not streams[k] and number[j] < number[i])
            else:
                expected = not streams[k] and (number[j] <= number[i] if context == "block" else pos[j] <= pos[i])
            assert bool(dense[q, k]) == expected


@settings(max_examples=12, deadline=None)
@given(
    documents=st.lists(st.integers(1, 14), min_size=1, max_size=3),
    b=st.sampled_from([1, 2, 4, 8]),
    prompt=st.integers(0, 5),
    phase=st.sampled_from(["zero", "random", "response"]),
    seed=st.integers(0, 99),
)
def test_clean_stream_is_plain_ar_for_every_draw(documents, b, prompt, phase, seed):
    """Invariant 1: with a causal context the clean copy's states are those of each document alone, whatever the block
    size, phase and masks; with a block-causal one they differ wherever a block has a second token."""
    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    batch = packed([[*documents, 9]], prompt=prompt)
    length = batch.input_ids.shape[1]

    def clean(context):
        goal = objective(block_size=b, phase=phase, context=context, ar_weight=0.0, block_first="noisy")
        inputs = goal.prepare(batch, seed=seed, step=0).inputs
        states = attention.hidden_states(model, inputs["input_ids"], inputs["position_ids"], inputs["layout"])
        return states[:, -length:]

    with torch.no_grad():
        start, alone = 0, []
        for size in [*documents, 9]:
            alone.append(model.model(batch.input_ids[:, start : start + size]).last_hidden_state)
            start += size
        torch.testing.assert_close(clean("causal"), torch.cat(alone, 1), atol=1e-13, rtol=0)  # sums in another order
        differs = (clean("block") - torch.cat(alone, 1)).abs().max() > 1e-6
    assert differs == (b > 1)


@pytest.mark.parametrize("context", ["causal", "block"])
def test_noisy_limits_of_both_contexts(context):
    """Invariant 2: b = 1 and nothing hidden: the noisy copy is the AR forward; b >= the document: it is the
    bidirectional one."""
    from adapt.objectives.masking import Mask

    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    batch = packed([[13]])
    nothing = Mask(torch.zeros(1, 13, dtype=torch.bool), torch.ones(1, 13))
    something = Mask(batch.labels == int(batch.input_ids[0, 5]), torch.ones(1, 13))
    for b, mask in ((1, torch.ones(13, 13).tril().bool()), (16, torch.ones(13, 13, dtype=torch.bool))):
        goal = objective(block_size=b, context=context, ar_weight=0.0, block_first="noisy")
        inputs = goal.lay_out(batch, Blocks.of(batch, b, "zero", 0), [something], size=b).inputs
        ids = inputs["input_ids"].clone()
        ids[:, :13] = batch.input_ids  # x~ = x
        with torch.no_grad():
            attention.use(model)
            noisy = attention.hidden_states(model, ids, inputs["position_ids"], inputs["layout"])[:, :13]
            model.set_attn_implementation("sdpa")
            plain = model.model(batch.input_ids, attention_mask=mask[None, None]).last_hidden_state
        torch.testing.assert_close(noisy, plain, atol=1e-13, rtol=0)
    assert not goal.lay_out(batch, Blocks.of(batch, 1, "zero", 0), [nothing], size=1).inputs["masked/target"].numel()
