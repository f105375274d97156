"""The global sequence: the same on any world size, from any step."""

from __future__ import annotations

from dataclasses import fields

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from adapt.data.batch import PAD, Batch
from adapt.data.mixture import Mixture
from adapt.data.plan import Plan
from adapt.data.rows import Rows
from adapt.data.stream import TrainStream, deal, eval_batches
from adapt.errors import UserError
from tests.data.helpers import make_shards, unique_documents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stream")


@pytest.fixture(scope="module")
def sources(folder):
    """Documents a hundred times longer in one source than in the other."""
    return [make_shards(folder, unique_documents(lengths)) for lengths in ([3] * 90, [300, 250, 333])]


def stream(sources, weights=(0.25, 0.75), seq_len=16, seed=3):
    return TrainStream([Rows(s, seq_len, seed) for s in sources], Plan([(0, list(weights))]))


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch))


def test_batches_have_the_declared_shapes_and_types(sources):
    batch = stream(sources).batch(range(5, 11))
    shapes = {f.name: (tuple(getattr(batch, f.name).shape), getattr(batch, f.name).dtype) for f in fields(Batch)}
    per_token = {"input_ids", "labels", "doc_ids", "position_ids", "role", "loss_weight"}
    dtypes = {"role": torch.int8, "loss_weight": torch.float32}
    assert shapes == {n: ((6, 16) if n in per_token else (6,), dtypes.get(n, torch.int64)) for n in shapes}


def test_token_fractions_hold_although_document_lengths_differ_a_hundredfold(sources):
    batch = stream(sources).batch(range(40))
    assert torch.bincount(batch.source).tolist() == [10, 30]


def test_position_is_a_function_of_its_number(sources):
    """No state: any position alone is what it is within a long reading."""
    whole, fresh = stream(sources).batch(range(90)), stream(sources)
    for n in (89, 3, 41, 0, 60):
        assert same(fresh.batch([n]), whole.rows(n, n + 1))


def test_locating_a_far_position_costs_one_look_up(sources, monkeypatch):
    calls = []
    look_up = Mixture.__getitem__
    monkeypatch.setattr(Mixture, "__getitem__", lambda self, n: calls.append(n) or look_up(self, n))
    _, epoch, row = stream(sources).locate(10**12)
    assert calls == [10**12]
    assert epoch > 10**9
    assert row >= 0


def test_every_source_is_read_once_per_epoch(sources):
    s = stream(sources)
    read = [s.locate(n) for n in range(400)]
    for source, rows in enumerate(s.rows):
        own = [(e, r) for i, e, r in read if i == source]
        for epoch in range(len(own) // len(rows)):
            assert sorted(r for e, r in own if e == epoch) == list(range(len(rows)))


@given(world=st.sampled_from([1, 2, 3, 4, 6]), step=st.integers(0, 40))
@settings(max_examples=25, deadline=None)
def test_the_ranks_together_read_the_same_step_on_any_world_size(sources, world, step):
    s = stream(sources)
    ranks = [s.step_batch(step, 12, rank, world) for rank in range(world)]
    assert all(b.num_rows == 12 // world for b in ranks)
    whole = s.batch(range(step * 12, (step + 1) * 12))
    interleaved = Batch.cat([b.rows(i, i + 1) for i in range(12 // world) for b in ranks])
    assert same(interleaved, whole)


def test_fingerprint_names_everything_that_decides_the_sequence(sources, folder):
    others = [
        stream(sources, weights=(0.3, 0.7)),
        stream(sources, seed=4),
        stream(sources, seq_len=32),
        stream(sources[::-1]),
        stream([sources[0], make_shards(folder, unique_documents([300, 250, 334]))]),
    ]
    assert stream(sources).fingerprint == stream(sources, weights=(1, 3)).fingerprint
    assert len({s.fingerprint for s in [stream(sources), *others]}) == 6


def test_preference_pairs_stay_together_on_a_rank(folder):
    pairs = make_shards(folder, unique_documents([5] * 12), pairs=True)
    s = stream([pairs], weights=[1.0])
    seen = []
    for rank in range(3):
        batch = s.step_batch(1, 6, rank, 3)
        assert batch.pair_index[0] == batch.pair_index[1]
        assert batch.sample_index.tolist() == [2 * int(batch.pair_index[0]), 2 * int(batch.pair_index[0]) + 1]
        seen.append(int(batch.pair_index[0]))
    assert len(set(seen)) == 3


def test_rows_that_cannot_be_dealt_out_are_refused_by_name(sources, folder):
    with pytest.raises(UserError, match=r"trainer.batch_tokens: 5 rows.*2 rank\(s\); give a multiple of 2 rows"):
        stream(sources).step_batch(0, 5, world=2)
    pairs = stream([make_shards(folder, unique_documents([5] * 4), pairs=True)], weights=[1.0])
    with pytest.raises(UserError, match=r"trainer.batch_tokens: 6 rows.*whole pairs; give a multiple of 4 rows"):
        pairs.step_batch(0, 6, world=2)


def test_pairs_and_plain_text_do_not_mix(sources, folder):
    pairs = make_shards(folder, unique_documents([5] * 4), pairs=True)
    with pytest.raises(UserError, match="mixes preference pairs"):
        stream([sources[0], pairs])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 7])
def test_held_out_rows_come_once_in_the_same_order_on_any_world_size(sources, world, limit):
    reference = Batch.cat(list(eval_batches(sources[0], 16, 4, limit)))
    per_rank = [list(eval_batches(sources[0], 16, 4, limit, rank, world)) for rank in range(world)]
    assert len({tuple(b.num_rows for b in batches) for batches in per_rank}) == 1  # collectives meet
    ranks = [Batch.cat(batches) for batches in per_rank]
    order = [(deal(i, r, world, 1), r, i) for r in range(world) for i in range(ranks[0].num_rows)]
    together = Batch.cat([ranks[r].rows(i, i + 1) for _, r, i in sorted(order)])
    real = together.sample_index >= 0
    assert int(real.sum()) == reference.num_rows == (limit or 17)
    assert same(together.rows(0, reference.num_rows), reference)
    assert bool((together.role[~real] == PAD).all())
    assert bool((together.labels[~real] == -100).all())
