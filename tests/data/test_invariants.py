"""The spec's invariants of mixing and packing (continual-pretraining.md, section 8), by their numbers."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from adapt.data.batch import PAD, Batch
from adapt.data.permute import uniform
from adapt.data.plan import Plan
from adapt.data.rows import Rows
from adapt.data.stream import TrainStream
from adapt.errors import UserError
from adapt.objectives.base import Facts
from adapt.objectives.block_diffusion import BlockDiffusion, BlockDiffusionConfig
from adapt.objectives.next_token import NextToken
from tests.data.helpers import make_shards, unique_documents
from tests.data.test_stream import same

PACKINGS = pytest.mark.parametrize("packing", ["windows", "best_fit"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("invariants")


@pytest.fixture(scope="module")
def sources(folder):
    """Documents a hundred times longer in one source than in the other."""
    return [make_shards(folder, unique_documents(lengths)) for lengths in ([3] * 900, [300] * 9)]


def stream(sources, plan: Plan, packing="windows", **kwargs) -> TrainStream:
    return TrainStream([Rows(s, 16, 3, packing=packing, **kwargs) for s in sources], plan)


def real_tokens(batch: Batch, source: int) -> int:
    return int((batch.role[batch.source == source] != PAD).sum())


PIECEWISE = [(0, [3, 1]), (60, [1, 1]), (150, [0, 1])]


@PACKINGS
@given(world=st.sampled_from([1, 2, 3, 4, 6]), step=st.integers(0, 30))
@settings(max_examples=15, deadline=None)
def test_3_a_resumed_run_on_any_world_size_reads_the_same_rows(sources, packing, world, step):
    """Mixed, in three phases, with a source that runs dry: the state is the step, and nothing else."""
    plan = Plan(PIECEWISE, limits=[100, None], renormalise=True, objective=[1, 2])
    whole = stream(sources, plan, packing).batch(range(31 * 12))
    fresh = stream(sources, Plan(PIECEWISE, limits=[100, None], renormalise=True, objective=[1, 2]), packing)
    ranks = [fresh.step_batch(step, 12, rank, world) for rank in range(world)]
    together = Batch.cat([b.rows(i, i + 1) for i in range(12 // world) for b in ranks])
    assert same(together, whole.rows(step * 12, (step + 1) * 12))


@PACKINGS
@pytest.mark.parametrize("weights", [[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]])
def test_4_token_fractions_hold_although_document_lengths_differ_a_hundredfold(sources, weights, packing):
    s = stream(sources, Plan([(0, weights)]), packing)
    found = np.zeros(2)
    for start in range(0, 400, 20):
        batch = s.batch(range(start, start + 20))
        found += [real_tokens(batch, 0), real_tokens(batch, 1)]
    assert np.abs(found / found.sum() - weights).max() < 0.02  # padding of best-fit rows, and a row of windows


def test_4_drawing_documents_by_weight_fails_the_same_test():
    """What the mixture is not: with probability w_i the next document is one of source i."""
    first = uniform(2000, 0) < 0.5
    tokens = np.array([3 * first.sum(), 300 * (~first).sum()])
    assert np.abs(tokens / tokens.sum() - 0.5).max() > 0.4


@PACKINGS
def test_5_replay_of_weight_zero_is_no_replay(sources, packing):
    alone = stream(sources[:1], Plan([(0, [1.0])]), packing)
    none = stream(sources, Plan([(0, [1.0, 0.0])]), packing)
    for step in (0, 7, 40):
        assert same(alone.step_batch(step, 12), none.step_batch(step, 12))


@pytest.mark.parametrize("replay", [0.0, 0.05, 0.25, 0.5])
def test_5_total_tokens_do_not_depend_on_the_share_of_replay(sources, replay):
    batch = stream(sources, Plan([(0, [1 - replay, replay])])).batch(range(100))
    assert batch.input_ids.numel() == 1600
    assert int((batch.source == 1).sum()) == round(100 * replay)


@PACKINGS
def test_6_every_document_is_seen_once_per_epoch_and_no_source_more_often_than_allowed(folder, packing):
    lengths = [[5, 20, 3, 9, 14, 40, 1, 1], [8] * 30]
    shards = [make_shards(folder, unique_documents(n)) for n in lengths]
    rows = [Rows(s, 16, 3, packing=packing) for s in shards]
    limits = [2 * rows[0].num_units, None]
    s = TrainStream(rows, Plan([(0, [1, 1]), (7, [3, 1])], limits=limits, renormalise=True))
    seen, epochs = Counter(), Counter()
    for n in range(150):
        source, epoch, _ = s.locate(n)
        batch = s.batch([n])
        if source == 0:
            epochs[epoch] += 1
            seen.update((epoch, t) for t in batch.input_ids[0][batch.role[0] != PAD].tolist())
    assert epochs == {0: len(rows[0]), 1: len(rows[0])}
    assert seen == {(e, t): 1 for e in range(2) for t in range(100, 100 + sum(lengths[0]))}


def test_6_reading_on_where_nothing_may_be_read_is_an_error(sources):
    s = stream(sources, Plan([(0, [1, 1])], limits=[5, None]))
    s.batch(range(10))
    with pytest.raises(UserError, match="the training data ends at row 10"):
        s.batch(range(11))


@PACKINGS
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=25), seq_len=st.integers(2, 33))
@settings(max_examples=30, deadline=None)
def test_8_targets_are_all_but_the_first_token_of_each_segment(folder, packing, lengths, seq_len):
    rows = Rows(make_shards(folder, unique_documents(lengths)), seq_len, 0, packing=packing)
    for i in range(len(rows)):
        row = rows[i]
        real = row["role"] != PAD
        sizes = np.unique(row["doc_ids"][real], return_counts=True)[1]
        assert int((row["labels"] != -100).sum()) == sum(n - 1 for n in sizes)
        first = real & (row["position_ids"] == 0)
        assert first.sum() == len(sizes)
        assert (row["labels"][first] == -100).all()


@PACKINGS
def test_across_documents_a_row_is_one_document(folder, packing):
    """The classical behaviour: positions run on, and first tokens are predicted from the end before them."""
    shards = make_shards(folder, unique_documents([5, 20, 3, 9, 14, 40, 1, 1]))
    apart, joined = (Rows(shards, 16, 0, packing=packing, cross_document_attention=c) for c in (False, True))
    assert len(apart) == len(joined)
    for i in range(len(apart)):
        a, b = apart[i], joined[i]
        real = a["role"] != PAD
        assert np.array_equal(a["input_ids"], b["input_ids"])
        assert np.array_equal(a["role"], b["role"])
        assert (b["doc_ids"][real] == 0).all()
        assert (b["doc_ids"][~real] == 1).all()
        assert b["position_ids"][real].tolist() == list(range(real.sum()))
        assert b["position_ids"][~real].tolist() == list(range((~real).sum()))
        assert b["labels"][real].tolist() == [-100, *a["input_ids"][real][1:].tolist()]
        assert (b["labels"][~real] == -100).all()


def test_across_documents_prompts_are_still_not_learned(folder):
    from adapt.data.batch import CONTEXT, TARGET

    documents = unique_documents([6, 6])
    shards = make_shards(folder, documents, roles=[[CONTEXT] * 3 + [TARGET] * 3] * 2)
    row = Rows(shards, 12, 0, cross_document_attention=True)[0]
    ids = row["input_ids"].tolist()
    assert row["labels"].tolist() == [-100] * 3 + ids[3:6] + [-100] * 3 + ids[9:]


def test_across_documents_every_objective_lays_a_row_out_as_one_document(folder):
    """Next-token and block diffusion: what a single document of these tokens would give."""
    lengths = [5, 7, 4]
    rows = Rows(make_shards(folder, unique_documents(lengths)), 16, 0, cross_document_attention=True)
    batch = TrainStream([rows], Plan([(0, [1.0])])).batch([0])
    shards = make_shards(folder, [batch.input_ids[0].tolist()])
    single = TrainStream([Rows(shards, 16, 0)], Plan([(0, [1.0])])).batch([0])
    config = BlockDiffusionConfig(block_size=4, growth=None)
    for objective in (NextToken(Facts()), BlockDiffusion(config, Facts(mask_token_id=3))):
        a, b = (objective.prepare(x, seed=0, step=0).inputs for x in (batch, single))
        assert a.keys() == b.keys()
        assert torch.equal(a["layout"].dense(), b["layout"].dense())
        assert all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))
