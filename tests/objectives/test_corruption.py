"""Spec invariants 1-9 and 13-15 of masked objectives: what is corrupted, what stays, and that nobody else notices."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt.data.batch import Batch
from adapt.data.noise import generator
from adapt.errors import UserError
from adapt.models import attention
from adapt.objectives.base import Facts, Models
from adapt.objectives.corruption import Ramp, Substitute, corrupt, eligible_inputs, row_generators, upstream_cycle51
from adapt.objectives.masked_thought import MaskedThought, MaskedThoughtConfig
from adapt.objectives.meap import Meap, MeapConfig
from adapt.objectives.next_token import NextToken
from adapt.tokenization.vocabulary import Vocabulary
from tests import tiny
from tests.batches import packed

MASK = 3
VOCABULARY = Vocabulary(special=np.arange(4), ordinary=np.arange(10, 300))
FACTS = Facts(mask_token_id=MASK, vocabulary=VOCABULARY, total_steps=100)
SUBSTITUTE = Substitute(MASK)


def meap(**config) -> Meap:
    return Meap(MeapConfig(**config), FACTS)


def thought(**config) -> MaskedThought:
    return MaskedThought(MaskedThoughtConfig(**{"ratio_schedule": None} | config), FACTS)


GOALS = {
    "meap": lambda **c: meap(**{"ratio": 0.3} | c),
    "masked_thought": lambda **c: thought(**{"ratio": 0.3} | c),
    "random ids": lambda **c: thought(**{"ratio": 0.3, "replace_rate": 1.0} | c),
}


def toss(eligible, ratio, count="exact", seed=0, **over):
    ids = torch.zeros(eligible.shape, dtype=torch.long)
    rngs = [generator(seed, row) for row in range(len(ids))]
    return corrupt(ids, eligible, ratio, count=count, noise=SUBSTITUTE, generators=rngs, **over)[1]


def loss_of(model, goal, batch, seed=0, step=0):
    prepared = goal.prepare(batch, seed=seed, step=step)
    sums = goal(Models(model), prepared.inputs)
    return sum(sums.values()) / next(iter(prepared.terms.values())).count


@pytest.mark.parametrize("name", GOALS)
def test_only_input_ids_differ_and_only_at_the_corrupted_positions(name):
    """Invariant 1: labels, positions and attention are bit-identical to next-token training's."""
    batch = packed([[20, 12], [32]], prompt=4, pad=3)
    untouched = {k: v.clone() for k, v in vars(batch).items()}
    goal = GOALS[name]()
    plain, made = (g.prepare(batch, seed=1, step=50) for g in (NextToken(Facts()), goal))
    assert all(torch.equal(untouched[k], v) for k, v in vars(batch).items()), "the batch itself stays clean"
    _, where = goal.corrupted(batch, 0.3, seed=1, step=50)
    assert where.any()
    ids = made.inputs["input_ids"]
    assert torch.equal(ids[~where], batch.input_ids[~where])
    if name != "random ids":
        assert (ids[where] == MASK).all()
    assert torch.equal(made.inputs["position_ids"], plain.inputs["position_ids"])
    assert torch.equal(made.inputs["layout"].dense(), plain.inputs["layout"].dense())
    labels = {}
    for term in made.terms:
        labels |= dict(zip(made.inputs[f"{term}/source"].tolist(), made.inputs[f"{term}/target"].tolist(), strict=True))
    assert labels == dict(zip(plain.inputs["source"].tolist(), plain.inputs["target"].tolist(), strict=True))


@pytest.mark.parametrize("family", ["llama", "mistral"])  # tied, untied
@pytest.mark.parametrize("name", GOALS)
def test_ratio_zero_is_next_token_training(name, family):
    """Invariant 2: identical ids, loss and gradients."""
    model = attention.use(tiny.tiny_model(family))
    batch, goal = packed([[20, 12], [32]], prompt=4, pad=3), GOALS[name](ratio=0.0)
    assert torch.equal(goal.prepare(batch, seed=0, step=0).inputs["input_ids"], batch.input_ids)
    losses = [loss_of(model, g, batch) for g in (goal, NextToken(Facts()))]
    assert torch.equal(*losses)
    found, plain = (torch.autograd.grad(x, list(model.parameters())) for x in losses)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_evaluation_sees_clean_inputs_whatever_the_ratio():
    """Invariant 2, second half: what is measured in a run (bits per byte) asks no objective."""
    from adapt.evaluate.context import EvalContext
    from adapt.evaluate.suites.bpb import measure
    from adapt.generation.contract import Contract

    model = attention.use(tiny.tiny_model())
    seen = []
    results = measure(
        EvalContext(
            call=torch.no_grad()(
                lambda goal, inputs: (seen.append(inputs["input_ids"]), goal(Models(model), inputs))[1]
            ),
            tokenizer=tiny.tiny_tokenizer(),
            eval_sets={"text": lambda: iter([packed([[24]])])},
            reduce=dict,
            facts=FACTS,
            contract=Contract.of(meap(ratio=0.9).export_fields()),
        )
    )
    assert math.isfinite(results["bpb/text"])
    assert torch.equal(seen[0], packed([[24]]).input_ids)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=4),
    ratio=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_exact_count(rows, ratio, seed):
    """Invariant 3: max(1, floor(ratio x eligible)) of each row, all of them eligible; none where there are none."""
    eligible = torch.tensor(rows)
    where = toss(eligible, ratio, seed=seed)
    assert not (where & ~eligible).any()
    for row in range(len(rows)):
        n = int(eligible[row].sum())
        assert int(where[row].sum()) == (max(1, math.floor(ratio * n)) if n and ratio else 0)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=3), min_size=1, max_size=3),
    ratio=st.sampled_from([0.0, 0.1, 0.34, 1.0]),
)
def test_exact_count_of_each_group(sizes, ratio):
    width, first = max(map(sum, sizes)), 0
    group = torch.zeros(len(sizes), width, dtype=torch.long)
    for row, spans in enumerate(sizes):
        numbers = torch.arange(len(spans)).repeat_interleave(torch.tensor(spans))
        group[row, : len(numbers)], group[row, len(numbers) :] = first + numbers, first + 2
        first += 3
    eligible = torch.rand(group.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    where = toss(eligible, ratio, group=group)
    for number in range(first):
        n = int((eligible & (group == number)).sum())
        assert int((where & (group == number)).sum()) == (max(1, math.floor(ratio * n)) if n and ratio else 0)


@pytest.mark.parametrize("count", ["exact", "bernoulli"])
def test_bernoulli_mean_and_uniform_inclusion(count):
    """Invariant 4, over 400,000 tokens within 4 sigma; the exact draw includes every position equally often, too."""
    eligible = torch.ones(4000, 100, dtype=torch.bool)
    eligible[:, ::7] = False
    n = int(eligible[0].sum())
    where = toss(eligible, 0.4, count)
    sigma = math.sqrt(0.4 * 0.6 / (4000 * n)) if count == "bernoulli" else 0
    expected = 0.4 if count == "bernoulli" else math.floor(0.4 * n) / n
    assert abs(where.sum() / eligible.sum() - expected) <= 4 * sigma + 1e-6
    frequency = where.float().mean(0)[eligible[0]]
    assert (frequency - expected).abs().max() < 4.5 * math.sqrt(0.4 * 0.6 / 4000)  # the largest of 85
    if count == "bernoulli":  # the count is binomial: its variance is not that of an exact draw
        assert abs(where.sum(1).float().var() / (n * 0.24) - 1) < 0.15


@settings(max_examples=20, deadline=None)
@given(documents=st.lists(st.integers(1, 20), min_size=1, max_size=4), prompt=st.integers(0, 6), seed=st.integers(0, 9))
def test_prompt_padding_specials_first_and_last_are_never_corrupted(documents, prompt, seed):
    """Invariant 5; a row in which nothing is eligible is unchanged."""
    batch = packed([documents, [len(documents)]], prompt=prompt, pad=4, seed=seed)
    batch.input_ids[:, ::5] = 1  # a chat marker
    config = MeapConfig(ratio=1.0, eligible="assistant")
    last = torch.ones_like(batch.doc_ids, dtype=torch.bool)
    last[:, :-1] = batch.doc_ids[:, 1:] != batch.doc_ids[:, :-1]
    forbidden = (batch.role != 2) | (batch.input_ids < 4) | (batch.position_ids == 0) | last
    ids, where = Meap(config, FACTS).corrupted(batch, 1.0, seed=seed, step=0)
    assert torch.equal(where, ~forbidden)
    assert torch.equal(ids[forbidden], batch.input_ids[forbidden])
    everything = eligible_inputs(batch, MeapConfig(exclude=()), None)
    assert torch.equal(everything, batch.role != 0)
    empty = packed([[3]], prompt=3)
    assert torch.equal(Meap(config, FACTS).corrupted(empty, 1.0, seed=seed, step=0)[0], empty.input_ids)


@pytest.mark.parametrize("name", GOALS)
def test_corruption_depends_on_seed_epoch_and_sample_alone(name):
    """Invariants 6 and 7: the same on any world size, microbatch split and after a resume (nothing is kept between
    calls); other rows, epochs and seeds have others."""
    batch, goal = packed([[64]] * 6), GOALS[name]()

    def made(b, seed=4):
        return goal.prepare(b, seed=seed, step=9).inputs["input_ids"]

    whole = made(batch)
    where = whole != batch.input_ids
    assert not torch.equal(where[2], where[3])
    for size in (1, 2, 4):
        split = [made(batch.rows(i, i + size)) for i in range(0, 6, size)]
        assert torch.equal(torch.cat(split), whole)
    dealt = [made(Batch.cat([batch.rows(i, i + 1) for i in range(rank, 6, 2)])) for rank in (0, 1)]
    assert torch.equal(torch.stack(dealt, 1).flatten(0, 1), whole)
    later = Batch(**{**vars(batch), "epoch": batch.epoch + 1})
    assert not torch.equal(made(later), whole)
    assert not torch.equal(made(batch, seed=5), whole)


def test_global_generators_are_untouched():
    """Invariant 7: torch's, numpy's and Python's."""
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    batch = packed([[64]] * 2)
    for goal in (meap(), meap(rng="upstream_cycle51", exclude=()), thought(replace_rate=0.5, random_ratio=True)):
        goal.prepare(batch, seed=0, step=3)
    meap(sft_layout="concat", min_answer_tokens=1).prepare(batch, seed=0, step=0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


def losses_by_target(goal, ids, batch, exclude):
    """Target position -> loss, of a toy model whose logits at i depend on x'[i] alone: a table."""
    table = torch.randn(320, 320, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = table[ids[0]]
    logits[:, exclude] = -math.inf
    nats = -logits.log_softmax(-1)
    return {t: float(nats[t - 1, batch.labels[0, t]]) for t in range(1, ids.shape[1]) if batch.labels[0, t] != -100}


def test_the_loss_of_a_target_changes_iff_the_input_before_it_is_corrupted():
    """Invariant 8, the shift; the two terms part the targets along the same line."""
    batch, goal = packed([[30, 10]]), meap(ratio=0.3)
    prepared = goal.prepare(batch, seed=2, step=0)
    ids = prepared.inputs["input_ids"]
    where = ids != batch.input_ids
    clean, noisy = (losses_by_target(goal, x, batch, MASK) for x in (batch.input_ids, ids))
    assert {t for t in clean if clean[t] != noisy[t]} == {t for t in clean if where[0, t - 1]}
    sources = {term: set(prepared.inputs[f"{term}/source"].tolist()) for term in prepared.terms}
    assert sources["corrupted_input"] == {t - 1 for t in clean if where[0, t - 1]}
    assert sources["clean_prefix"] == {t - 1 for t in clean if not where[0, t - 1]}
    for term in prepared.terms:  # aligned: output i predicts clean token i + 1
        following = batch.input_ids[0, prepared.inputs[f"{term}/source"] + 1]
        assert torch.equal(prepared.inputs[f"{term}/target"], following)


def test_corruption_at_m_changes_no_state_before_m():
    """Invariant 9."""
    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    batch = packed([[20, 12]])
    layout = meap().prepare(batch, seed=0, step=0).inputs["layout"]
    ids = batch.input_ids.clone()
    with torch.no_grad():
        clean = attention.hidden_states(model, ids, batch.position_ids, layout)
        ids[0, 9] = MASK
        noisy = attention.hidden_states(model, ids, batch.position_ids, layout)
    changed = (clean - noisy).abs().amax(-1)[0] > 0
    assert changed[9:20].all()
    assert not changed[:9].any()
    assert not changed[20:].any(), "nor any of the next document"


def test_loss_on_counts_the_targets_it_names():
    """Invariant 10, first half: `corrupted` counts the targets {m in M, m >= 1}."""
    batch = packed([[40, 24], [64]], prompt=3)
    for loss_on in ("all_targets", "corrupted", "clean_targets"):
        goal = thought(ratio=0.4, loss_on=loss_on)
        prepared = goal.prepare(batch, seed=0, step=0)
        where = prepared.inputs["input_ids"] != batch.input_ids
        learned = {"all_targets": torch.ones_like(where), "corrupted": where, "clean_targets": ~where}[loss_on]
        learned = learned & (batch.labels != -100)
        counts = {term.count for term in prepared.terms.values()}
        assert counts == {int(learned.sum())} == {sum(t.targets for t in prepared.terms.values())}
        sources = torch.cat([prepared.inputs[f"{t}/source"] for t in prepared.terms])
        assert torch.equal(sources.sort().values, (learned.flatten().nonzero()[:, 0] - 1))


@pytest.mark.parametrize("start", [0.0, 0.1])
@pytest.mark.parametrize("total", [10, 997])
def test_ratio_schedule(total, start):
    """Invariant 12: p(0) = start, linear, within 1/(wS) of p_max at s = wS, constant after, never above."""
    ramp, p, w = Ramp(start=start), 0.4, 0.66
    values = [ramp.at(p, s, total) for s in range(total + 1)]
    assert values[0] == start
    assert max(values) <= p
    edge = math.floor(w * total)
    assert abs(values[edge] - p) <= 2 / (w * total)
    assert values[edge + 2 :] == [p] * (total - edge - 1)
    steps = np.diff(values[: edge + 1])
    assert np.allclose(steps, steps[0])
    if start == 0:
        assert np.allclose(values, [min(p, p * s / (w * total + 1)) for s in range(total + 1)], atol=1e-15)


def test_random_tokens_are_ordinary_and_masks_are_masks():
    """Invariant 13, for the tokenizer at hand: no special, added, reserved or padded-tail id."""
    tokenizer = tiny.tiny_tokenizer.__wrapped__()
    tokenizer.add_tokens(["addedword"])
    config = tiny.tiny_config(vocab_size=400)
    vocabulary = Vocabulary.of(tokenizer, config)
    assert set(vocabulary.special) == {0, 1, 2, 3}, "the reserved one is marked special, too"
    assert not set(vocabulary.ordinary) & {0, 1, 2, 3, tokenizer.convert_tokens_to_ids("addedword")}
    assert vocabulary.ordinary.max() < 320
    facts = Facts(mask_token_id=MASK, vocabulary=vocabulary)
    batch = packed([[400]] * 20)
    for rate, drawn in ((1.0, set(vocabulary.ordinary)), (0.0, {MASK}), (0.5, {*vocabulary.ordinary, MASK})):
        config = MaskedThoughtConfig(ratio=0.5, ratio_schedule=None, replace_rate=rate)
        ids, where = MaskedThought(config, facts).corrupted(batch, 0.5, seed=0, step=0)
        found = set(ids[where].tolist())
        assert found <= drawn
        assert len(found) > 0.9 * len(drawn)
        assert abs((ids[where] != MASK).float().mean() - rate) < 0.03


def test_pieces_no_merge_makes_are_not_ordinary():
    """Invariant 13, "reachable": a vocabulary entry that tokenising never gives has an embedding that never trained."""
    import json

    tokenizer = tiny.tiny_tokenizer.__wrapped__()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["zzzqqq"] = 320
    tokenizer._tokenizer = type(tokenizer._tokenizer).from_str(json.dumps(state))
    ordinary = set(Vocabulary.of(tokenizer, tiny.tiny_config(vocab_size=321)).ordinary.tolist())
    assert 320 not in ordinary
    seen = set(tokenizer(tiny.TEXT)["input_ids"])
    assert seen <= ordinary


@pytest.mark.parametrize("name", ["meap", "masked_thought"])
def test_a_mask_token_in_the_data_is_refused_by_the_name_of_the_dataset(name):
    """Invariant 14: it is in no text, hence in no label. Padding may be anything."""
    batch = packed([[20], [12]], pad=4)
    batch = Batch(**{**vars(batch), "source": torch.tensor([0, 2])})
    batch.input_ids[batch.role == 0] = MASK
    GOALS[name]().prepare(batch, seed=0, step=0)
    batch.input_ids[1, 5] = MASK
    with pytest.raises(UserError, match=r"data\.train\[2\].*row 1 contains the mask token \(id 3\) 1 time"):
        GOALS[name]().prepare(batch, seed=0, step=0)
    GOALS["random ids"]().prepare(batch, seed=0, step=0)  # without masks there is nothing to confuse it with


def test_the_mask_token_is_not_in_the_softmax_of_corrupted_rows():
    """Its output row is never trained; as in block diffusion."""
    model = attention.use(tiny.tiny_model("mistral", dtype=torch.float64))  # untied
    loss_of(model, meap(ratio=0.3), packed([[24]])).backward()
    assert model.lm_head.weight.grad[MASK].abs().max() == 0
    assert model.lm_head.weight.grad[10].abs().max() > 0
    assert model.model.embed_tokens.weight.grad[MASK].abs().max() > 0


def test_pad_equal_to_eos_still_trains_eos(tmp_path):
    """Invariant 15: through the real data path, and the EOS may be corrupted yet is a target; the mask is neither."""
    import json

    from adapt.components import conversions
    from adapt.config import resolve
    from adapt.conversion.base import planned_tokenizer
    from adapt.data.plan import Plan
    from adapt.data.prepare import prepare
    from adapt.data.rows import Rows
    from adapt.data.stream import TrainStream
    from tests.recipes import tiny_recipe

    tokenizer = tiny.tiny_tokenizer.__wrapped__()
    tokenizer.pad_token = tokenizer.eos_token
    tiny.tiny_model(pad_token_id=0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    assert "mask_token" in conversions.names()
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"add {i}", "response": f"it is {i} words"}) for i in range(30)))
    recipe = tiny_recipe(tmp_path / "base", tmp_path)
    recipe["data"]["train"] = [{"source": {"name": "jsonl", "path": str(path)}}]
    recipe = resolve(recipe).recipe
    planned = planned_tokenizer(recipe)
    assert planned.pad_token_id == planned.eos_token_id != planned.mask_token_id
    stream = TrainStream([Rows(s, 64, 0) for s in prepare(recipe, planned).train], Plan([(0, [1.0])]))
    batch = stream.step_batch(0, 2)
    prepared = thought(ratio=0.9).prepare(batch, seed=0, step=0)
    targets = torch.cat([prepared.inputs[f"{t}/target"] for t in prepared.terms]).tolist()
    ends = int(((batch.input_ids == 2) & (batch.role == 2)).sum())  # the chat template's <|im_end|>
    assert targets.count(2) == ends > 0
    assert MASK not in targets
    assert (prepared.inputs["input_ids"][batch.input_ids == 2] == MASK).any()


def test_upstream_patterns():
    """The 51 patterns of MEAP's scripts, without the process-wide generator they reseed."""
    rng = random.Random(50 + 7)
    expected = rng.sample(range(4095), 614)
    assert sorted(expected) == np.flatnonzero(upstream_cycle51(7 + 51, 4096, 0.15)).tolist()
    batch = packed([[64]] * 3)
    goal = meap(rng="upstream_cycle51", exclude=(), ratio=0.15)
    _, where = goal.corrupted(batch, 0.15, seed=0, step=3)
    assert (where == where[0]).all()
    assert int(where[0].sum()) == 9
    assert not torch.equal(where, goal.corrupted(batch, 0.15, seed=0, step=4)[1])
    assert torch.equal(where, goal.corrupted(batch, 0.15, seed=9, step=54)[1])


def test_generators_are_keyed_apart_from_other_draws():
    batch = packed([[8]])
    ours = row_generators(batch, 0)[0].random(4)
    assert not np.array_equal(ours, generator(0, 0, 0, 0).random(4)), "block diffusion's masks"


def test_logged_terms_are_means_over_their_own_targets_and_the_loss_over_all():
    """Two terms with one divisor: the loss is that of one term, and what is logged of each can be read by itself."""
    from adapt.distributed.world import World
    from adapt.train.root import Root
    from adapt.train.step import gradients, loss_values

    root = Root(attention.use(tiny.tiny_model()))
    batch, goal = packed([[30, 10], [40], [8, 32]], prompt=4), thought(ratio=0.4)
    world = World(0, 0, 1, 1, torch.device("cpu"))
    found = gradients(root, goal, batch, microbatch=2, seed=0, step=0, world=world, clip=None)
    values = loss_values(found)
    sums, counts = {n: float(s) for n, s in found.sums.items()}, found.targets
    assert sum(counts.values()) == int((batch.labels != -100).sum())
    assert set(found.counts.values()) == {sum(counts.values())}
    assert values["loss"] == pytest.approx(sum(sums.values()) / sum(counts.values()))
    assert {n: values[f"loss/{n}"] for n in sums} == pytest.approx({n: sums[n] / counts[n] for n in sums})
    assert values["loss"] == pytest.approx(float(loss_of(root.student, goal, batch).detach()), rel=1e-5)
    clean = gradients(root, thought(ratio=0.0), batch, microbatch=3, seed=0, step=0, world=world, clip=None)
    assert "loss/corrupted_input" not in loss_values(clean), "a mean of nothing is no number"
