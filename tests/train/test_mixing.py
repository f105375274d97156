"""Mixing as a run does it: what recipes may ask for, what is said before the first step, and what losses come out."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch

from adapt.config import resolve
from adapt.data.batch import Batch
from adapt.data.plan import Plan
from adapt.data.rows import Rows
from adapt.data.stream import TrainStream
from adapt.distributed.world import World
from adapt.errors import StopRequested, UserError
from adapt.models import attention
from adapt.objectives.base import Facts
from adapt.objectives.block_diffusion import BlockDiffusion, BlockDiffusionConfig
from adapt.objectives.next_token import NextToken
from adapt.train.feed import feed_of
from adapt.train.fit import fit
from adapt.train.mixing import mixing_problems, weight_phases
from adapt.train.root import Root
from adapt.train.state import State
from adapt.train.step import gradients
from tests import tiny
from tests.batches import packed
from tests.data.helpers import make_shards, unique_documents
from tests.recipes import corpus, tiny_recipe
from tests.train.test_fit import assert_same_run, losses, stop_after

WORLD = World(0, 0, 1, 1, torch.device("cpu"))


def recipe_of(tmp_path, entries: list[dict], trainer: dict | None = None, **data):
    source = {"name": "jsonl", "path": str(tmp_path / "none.jsonl")}
    train = [{"source": source, "name": f"s{i}", **entry} for i, entry in enumerate(entries)]
    trainer = {"steps": 20, "batch_tokens": 64, **(trainer or {})}
    over = {"data": {"train": train, "seq_len": 16, **data}, "trainer": trainer}
    return resolve(tiny_recipe(tmp_path, tmp_path, **over)).recipe


# What recipes may say


def test_weights_are_numbers_or_phases(tmp_path):
    entries = [{"weight": [{"until": 0.5, "weight": 3}, {"until": 15, "weight": 1}, {"weight": 0}]}, {"weight": 1}]
    recipe = recipe_of(tmp_path, entries)
    assert list(mixing_problems(recipe)) == []
    assert weight_phases(recipe.data.train, 20) == [(0, [3.0, 1.0]), (10, [1.0, 1.0]), (15, [0.0, 1.0])]
    assert weight_phases(recipe.data.train[1:], 20) == [(0, [1.0])]
    again = resolve(json.loads(json.dumps(_plain(recipe)))).recipe
    assert again == recipe


def _plain(recipe):
    from adapt.config.decode import encode

    return encode(recipe)


def test_each_source_has_phases_of_its_own(tmp_path):
    entries = [
        {"weight": [{"until": 5, "weight": 2}, {"weight": 4}]},
        {"weight": [{"until": 8, "weight": 0}, {"weight": 1}]},
    ]
    recipe = recipe_of(tmp_path, entries)
    assert weight_phases(recipe.data.train, 20) == [(0, [2.0, 0.0]), (5, [4.0, 0.0]), (8, [4.0, 1.0])]


WRONG = {
    "negative": ([{"weight": -1}], {}, "data.train[0].weight"),
    "all zero": ([{"weight": 0}, {"weight": 0}], {}, "data.train"),
    "all zero at the end": ([{"weight": [{"until": 0.5, "weight": 1}, {"weight": 0}]}], {}, "data.train"),
    "no phases": ([{"weight": []}], {}, "data.train[0].weight"),
    "no end": ([{"weight": [{"weight": 1}, {"weight": 2}]}], {}, "data.train[0].weight[0].until"),
    "an end too many": ([{"weight": [{"until": 0.5, "weight": 1}]}], {}, "data.train[0].weight[0].until"),
    "backwards": (
        [{"weight": [{"until": 0.5, "weight": 1}, {"until": 0.2, "weight": 1}, {"weight": 2}]}],
        {},
        "data.train[0].weight[1].until",
    ),
    "never comes": ([{"weight": [{"until": 20, "weight": 1}, {"weight": 2}]}], {}, "data.train[0].weight[0].until"),
    "phase below zero": (
        [{"weight": [{"until": 0.5, "weight": -1}, {"weight": 2}]}],
        {},
        "data.train[0].weight[0].weight",
    ),
    "no epochs": ([{"max_epochs": 0}], {}, "data.train[0].max_epochs"),
    "no share in the loss": ([{"objective_weight": 0}], {}, "data.train[0].objective_weight"),
    "nothing can run dry": ([{}], {"exhausted": "stop"}, "data.exhausted"),
    "cold": ([{}], {"temperature": -1.0}, "data.temperature"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_sense_is_named(case, tmp_path):
    entries, data, where = WRONG[case]
    assert [p.where for p in mixing_problems(recipe_of(tmp_path, entries, **data))] == [where]


def test_held_out_data_has_no_limits_and_no_share_in_the_loss(tmp_path):
    recipe = recipe_of(tmp_path, [{}])
    held_out = dataclasses.replace(recipe.data.eval[0], max_epochs=2.0, objective_weight=1.0)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, eval=(held_out,)))
    assert [p.where for p in mixing_problems(recipe)] == ["data.eval[0].objective_weight", "data.eval[0].max_epochs"]


def test_preference_pairs_refuse_what_is_for_packed_text(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path, [{"objective_weight": 2}], packing="best_fit", cross_document_attention=True)
    monkeypatch.setattr(type(recipe.objective), "declares", lambda self, what: what == "pairs")
    found = [p.where for p in mixing_problems(recipe)]
    assert found == ["data.packing", "data.cross_document_attention", "data.train[0].objective_weight"]


def test_a_mistake_inside_a_phase_is_named_by_its_own_key(tmp_path):
    with pytest.raises(UserError, match=r"data.train\[0\].weight\[0\].til: there is no such key"):
        recipe_of(tmp_path, [{"weight": [{"til": 0.5, "weight": 1}, {"weight": 2}]}])


# What is said before the first step. Sources of 40 and 10 rows of 16 tokens, 20 steps of 4 rows.


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("feed")
    return [make_shards(folder, unique_documents([16] * n)) for n in (40, 10)]


def test_the_header_says_what_is_read_of_each_source(shards, tmp_path):
    feed = feed_of(recipe_of(tmp_path, [{"weight": 3}, {"weight": 1}]), shards, State(), 4)
    assert list(feed.reads.values()) == [
        "75 % of the tokens, 60 rows, 1.5 epoch(s)",
        "25 % of the tokens, 20 rows, 2 epoch(s)",
    ]
    assert (feed.steps, feed.ends_early, feed.notes) == (20, False, [])


def test_more_than_four_epochs_are_a_warning(shards, tmp_path):
    (note,) = feed_of(recipe_of(tmp_path, [{}, {"weight": 2}]), shards, State(), 4).notes
    assert "made-up [1] is read 5.3 times" in note
    assert "data.train[1].max_epochs" in note


def test_too_many_epochs_fail_before_the_first_step_all_at_once(shards, tmp_path):
    recipe = recipe_of(tmp_path, [{"max_epochs": 0.9}, {"max_epochs": 3}])
    with pytest.raises(UserError) as caught:
        feed_of(recipe, shards, State(), 4)
    assert [p.where for p in caught.value.problems] == ["data.train[0].max_epochs", "data.train[1].max_epochs"]
    assert "would be read 4 times, and 3 are allowed" in caught.value.problems[1].what
    assert "there is enough for trainer.steps=15" in caught.value.problems[1].what
    enough = dataclasses.replace(recipe, trainer=dataclasses.replace(recipe.trainer, steps=15))
    assert feed_of(enough, shards, State(), 4).steps == 15


def test_stop_ends_the_stage_where_a_source_has_run_dry(shards, tmp_path):
    recipe = recipe_of(tmp_path, [{}, {"max_epochs": 3}], exhausted="stop")
    feed = feed_of(recipe, shards, State(), 4)
    assert (feed.steps, feed.ends_early) == (15, True)
    assert "ends after 15 of 20 steps" in feed.notes[0]
    with pytest.raises(UserError, match="data.train\\[1\\].max_epochs"):  # not even one step
        feed_of(recipe_of(tmp_path, [{}, {"max_epochs": 0.1}], exhausted="stop"), shards, State(), 4)


def test_renormalise_goes_on_without_the_source(shards, tmp_path):
    recipe = recipe_of(tmp_path, [{}, {"max_epochs": 3}], exhausted="renormalise")
    feed = feed_of(recipe, shards, State(), 4)
    assert (feed.steps, feed.ends_early) == (20, False)
    assert "made-up [1] runs dry in step 16" in feed.notes[0]
    assert feed.stream.plan.counts(80) == [50, 30]


def test_weights_of_documents_that_are_not_there_are_missed(shards, tmp_path):
    recipe = recipe_of(tmp_path, [{}, {"document_weight_as": "loss"}])
    with pytest.raises(UserError, match=r"data.train\[1\].document_weight_as: made-up has no weights of documents"):
        feed_of(recipe, shards, State(), 4)


def test_temperature_mixes_by_size(shards, tmp_path):
    for alpha, expected in ((None, [40, 40]), (0.5, [54, 26]), (1.0, [64, 16])):
        feed = feed_of(recipe_of(tmp_path, [{}, {}], temperature=alpha), shards, State(), 4)
        assert feed.stream.plan.counts(80) == expected


def test_a_stage_with_other_weights_goes_on_in_every_source(shards, tmp_path):
    """A second stage on the same data reads what the first one left, whatever its weights."""
    state = State()
    first = feed_of(recipe_of(tmp_path, [{"weight": 3}, {"weight": 1}]), shards, state, 4)
    state.read = first.stream.plan.counts(80)
    second = feed_of(recipe_of(tmp_path, [{"weight": 1}, {"weight": 3}]), shards, state, 4)
    assert state.read == [60, 20]
    assert second.stream.plan.counts(80) == [80, 80]
    assert "before this stage" in second.reads["made-up [0]"]
    seen = [first.stream.locate(n) for n in range(80)] + [second.stream.locate(n) for n in range(80)]
    assert len(set(seen)) == 160
    feed_of(recipe_of(tmp_path, [{}, {}], packing="best_fit"), shards, state, 4)  # other rows begin anew
    assert state.read == []


def test_changed_weights_are_refused_on_resume(shards, tmp_path):
    state = State()
    feed_of(recipe_of(tmp_path, [{}, {}]), shards, state, 4)
    state.stage_step = 3
    feed_of(recipe_of(tmp_path, [{}, {}], trainer={"steps": 30}), shards, state, 4)  # more steps, the same rows
    for entries, data in (
        ([{}, {"weight": 2}], {}),
        ([{}, {"objective_weight": 2}], {}),
        ([{}, {}], {"packing": "best_fit"}),
    ):
        with pytest.raises(UserError, match="the training data changed since this run's checkpoint"):
            feed_of(recipe_of(tmp_path, entries, **data), shards, dataclasses.replace(state), 4)
    phased = [{}, {"weight": [{"until": 0.5, "weight": 1}, {"weight": 2}]}]
    state = State()
    feed_of(recipe_of(tmp_path, phased), shards, state, 4)
    state.stage_step = 3
    with pytest.raises(UserError, match="the steps that their phases are shares of"):
        feed_of(recipe_of(tmp_path, phased, trainer={"steps": 30}), shards, state, 4)


# Losses


def model_of(seed: int = 0) -> Root:
    return Root(attention.use(tiny.tiny_model(dtype=torch.float64, seed=seed)))


def grads(root: Root, batch: Batch, microbatch: int, objective=None, world=WORLD) -> tuple[dict, torch.Tensor]:
    """({parameter: gradient}, mean loss)."""
    root.zero_grad(set_to_none=True)
    objective = objective or NextToken(Facts())
    result = gradients(root, objective, batch, microbatch=microbatch, seed=0, step=0, world=world, clip=None)
    total = sum(result.weights[n] * s.double() / result.counts[n] for n, s in result.sums.items())
    return {n: p.grad.clone() for n, p in root.named_parameters()}, total


class OneOfTwo:
    """The world of one of two ranks that know what the other one counted."""

    size, rank, local_size, main, device = 2, 0, 1, True, torch.device("cpu")

    def __init__(self, other: list[int]):
        self.other = other

    def sum(self, numbers):
        return [a + b for a, b in zip(numbers, self.other, strict=True)]

    def add_up(self, tensor):
        return tensor


OBJECTIVES = {
    "next_token": NextToken(Facts()),
    "block_diffusion": BlockDiffusion(BlockDiffusionConfig(block_size=4, growth=None), Facts(mask_token_id=3)),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_9_loss_and_gradients_do_not_depend_on_the_split(objective):
    """(1 x 8), (2 x 4), (8 x 1), and one rank or two whose rows have very different numbers of targets."""
    objective, root = OBJECTIVES[objective], model_of()
    lengths = [[12, 3], [2, 2, 2, 2, 7], [15], [1] * 15, [3] * 5, [14, 1], [5, 5], [6]]
    batch = packed(lengths, pad=2)
    batch = dataclasses.replace(batch, loss_weight=batch.loss_weight * (1 + torch.arange(8.0)[:, None] / 4))
    expected, loss = grads(root, batch, 8, objective)
    for microbatch in (1, 2, 4):
        found, other = grads(root, batch, microbatch, objective)
        torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)  # sums are logged in float32
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-12, rtol=1e-9)
    halves = [batch.rows(0, 4), batch.rows(4, 8)]
    counts = [[t.count for t in objective.prepare(h, seed=0, step=0).terms.values()] for h in halves]
    assert counts[0] != counts[1]
    ranks = [grads(root, halves[r], 2, objective, OneOfTwo([*counts[1 - r], *counts[1 - r], 0, 0]))[0] for r in (0, 1)]
    for name in expected:
        torch.testing.assert_close((ranks[0][name] + ranks[1][name]) / 2, expected[name], atol=1e-12, rtol=1e-9)


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory):
    """Eight rows of 16 tokens each, every row of four documents: packed, and the same number of targets everywhere."""
    folder, rng = tmp_path_factory.mktemp("objective"), random.Random(0)
    return [
        make_shards(folder, [[rng.randrange(low, low + 100) for _ in range(4)] for _ in range(32)]) for low in (10, 200)
    ]


def stream(sources, plan: Plan, **kwargs) -> TrainStream:
    return TrainStream([Rows(s, 16, 3, **kwargs) for s in sources], plan)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_10_objective_weights_equal_to_the_weights_are_the_plain_loss_bit_for_bit(objective, two_sources):
    root = model_of()
    plain, same = (stream(two_sources, Plan([(0, [0.75, 0.25])], objective=o)).batch(range(16)) for o in (None, [3, 1]))
    (a, loss), (b, other) = (grads(root, batch, 4, OBJECTIVES[objective]) for batch in (plain, same))
    assert torch.equal(loss, other)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_10_the_expected_gradient_is_that_of_sampling_at_the_objective_weights(two_sources):
    """Over whole epochs of both sources, which is the expectation: read 3 to 1 and weighted 1 to 1, or read 1 to 1."""
    root = model_of()
    weighted = stream(two_sources, Plan([(0, [3, 1])], objective=[1, 1])).batch(range(32))
    sampled = stream(two_sources, Plan([(0, [1, 1])])).batch(range(16))
    unweighted = stream(two_sources, Plan([(0, [3, 1])])).batch(range(32))
    (a, loss), (b, other), (c, _) = (grads(root, batch, 8) for batch in (weighted, sampled, unweighted))
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=0)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-7, rtol=1e-6)  # factors are float32
    assert max(float((b[name] - c[name]).abs().max()) for name in b) > 1e-4


# Runs


def mixed(base, tmp_path, name: str) -> dict:
    train = [
        {
            "source": {"name": "jsonl", "path": str(corpus(tmp_path, 60))},
            "name": "new",
            "weight": [{"until": 0.5, "weight": 3}, {"weight": 1}],
            "objective_weight": 1,
        },
        {
            "source": {"name": "jsonl", "path": str(corpus(tmp_path, 4, seed=5))},
            "name": "old",
            "max_epochs": 1,
        },
    ]
    data = {"train": train, "packing": "best_fit", "exhausted": "renormalise"}
    return tiny_recipe(base, tmp_path, run={"name": name}, data=data)


def test_a_mixed_run_resumes_with_the_same_rows_at_any_step(tiny_base, tmp_path, monkeypatch, capsys):
    """Phases, best-fit rows, a source that runs dry, objective weights: stopped at a random step, the same losses."""
    straight = mixed(tiny_base, tmp_path, "straight")
    fit(resolve(straight))
    shown = capsys.readouterr().out
    assert "epoch(s)" in shown
    assert "old runs dry in step" in shown
    broken, step = mixed(tiny_base, tmp_path, "broken"), random.Random(1).randrange(1, 6)
    with monkeypatch.context() as patched, pytest.raises(StopRequested, match=f"after step {step}"):
        stop_after(patched, step)
        fit(resolve(broken))
    fit(resolve(broken), "yes")
    runs = tmp_path / "runs"
    assert_same_run(runs / "straight", runs / "broken")


def test_a_run_that_stops_with_its_data_is_finished(tiny_base, tmp_path, capsys):
    recipe = mixed(tiny_base, tmp_path, "short")
    recipe["data"]["exhausted"] = "stop"
    recipe["trainer"] = {"steps": 40, "batch_tokens": 256, "microbatch": 2}
    recipe["data"]["train"][0]["weight"] = 1
    fit(resolve(recipe))
    run = tmp_path / "runs" / "short"
    steps = sorted(losses(run))
    assert 1 <= len(steps) < 40
    assert f"the stage ends after {len(steps)} of 40 steps" in capsys.readouterr().out
    fit(resolve(recipe), "auto")
    assert sorted(losses(run)) == steps
    assert "done before" in capsys.readouterr().out


def test_a_run_across_documents_trains_and_is_measured_on_documents_apart(tiny_base, tmp_path):
    """The option changes the losses, and not what is measured before the first step."""
    before, found = [], []
    for name, across in (("apart", False), ("across", True)):
        recipe = tiny_recipe(tiny_base, tmp_path, run={"name": name}, trainer={"steps": 2, "batch_tokens": 256})
        recipe["data"]["cross_document_attention"] = across
        fit(resolve(recipe))
        run = tmp_path / "runs" / name
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        before.append(
            next({k: v for k, v in x.items() if k.startswith("eval/")} for x in lines if "eval/bpb/held-out" in x)
        )
        found.append(losses(run))
    assert before[0] == before[1]
    assert found[0] != found[1]
