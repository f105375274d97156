"""Preference pairs in a run: the reference is taken at the start of the stage, kept, and gone on with."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from adapt.cli import main
from adapt.config import resolve
from adapt.errors import StopRequested, UserError
from adapt.train.fit import fit
from adapt.train.start_values import StartValues
from tests import tiny
from tests.recipes import preferences, tiny_recipe
from tests.train.test_fit import assert_same_run, launch, losses, stop_after
from tests.train.test_teacher import logged


@pytest.fixture
def dropout_base(tmp_path):
    return tiny.save_tiny(tmp_path / "base", attention_dropout=0.2)


def dpo(base, folder, name="tiny", objective=None, **over):
    """6 steps of 4 pairs of 12: two epochs."""
    over = {"model": {"conversions": []}, "run": {"name": name}, "optimizer": {"name": "adamw", "lr": 3e-3}} | over
    over["trainer"] = {"batch_tokens": 512, "microbatch": 4} | over.get("trainer", {})
    recipe = tiny_recipe(base, folder, objective=objective or {"name": "dpo", "beta": 0.5}, **over)
    recipe["data"]["train"] = [{"source": {"name": "jsonl", "path": str(preferences(folder))}, "name": "pairs"}]
    return recipe | {"evaluation": {"suites": ["bpb"], "limit": 2}, "generation": {}}


def kept(run, stage=0):
    found = load_file(run / "start" / f"stage-{stage}.safetensors")
    keys = zip(found["source"].tolist(), found["row"].tolist(), strict=True)
    return dict(zip(keys, found["value"].tolist(), strict=True))


def test_the_loss_starts_at_ln_2_and_the_student_learns_to_prefer(tiny_base, tmp_path, capsys):
    recipe = dpo(tiny_base, tmp_path, trainer={"steps": 12})
    held_out = {"source": {"name": "jsonl", "path": str(preferences(tmp_path, seed=1))}, "name": "held-out pairs"}
    recipe["data"]["eval"] = [*recipe["data"]["eval"], held_out | {"guard": True}]
    recipe["evaluation"] |= {"suites": ["preference", "bpb"], "limit": 8}
    fit(resolve(recipe))
    run = tmp_path / "runs" / "tiny"
    right, beyond = (logged(run, f"eval/{name}/held-out pairs") for name in ("preference", "preference_margin"))
    assert right[12] >= right[0]
    assert beyond[12] > beyond[0] + 1
    assert not logged(run, "eval/bpb/held-out pairs")
    capsys.readouterr()
    main(["evaluate", str(run), "--json"])
    again = json.loads(capsys.readouterr().out)
    assert again["preference_margin/held-out pairs"] == pytest.approx(beyond[12], rel=1e-4)
    found = losses(run)
    assert found[1] == pytest.approx(math.log(2), rel=1e-7)
    assert found[12] < 0.5 * found[1]
    accuracy, margin = logged(run, "loss/accuracy"), logged(run, "loss/margin")
    assert margin[1] == 0.0
    assert accuracy[12] == 1.0
    assert margin[12] == pytest.approx(logged(run, "loss/reward_chosen")[12] - logged(run, "loss/reward_rejected")[12])


def test_the_reference_is_the_student_that_the_stage_before_distilled(tiny_base, tmp_path):
    """Latent attention taught by the base, then preferences: the reference is neither the base nor the student as it was
    converted. Each row once, whatever the epochs; the export holds what the second stage made."""
    conversions = {"conversions": [{"name": "xecomla", "kv_rank": 16}]}
    distilled = dpo(tiny_base, tmp_path, objective="logit_distillation", model=conversions) | {
        "teacher": {"base": "self"}
    }
    pairs = distilled["data"]["train"]
    distilled["data"]["train"] = tiny_recipe(tiny_base, tmp_path)["data"]["train"]
    distilled["stages"] = [
        {"name": "distillation", "trainer": {"steps": 3}},
        {"name": "preferences", "objective": "dpo", "teacher": None, "data": {"train": pairs}},
    ]
    fit(resolve(distilled))
    run = tmp_path / "runs" / "tiny"
    assert losses(run)[4] == pytest.approx(math.log(2), rel=1e-7)
    assert losses(run)[9] < 0.9 * math.log(2)
    assert not (run / "start" / "stage-0.safetensors").exists()
    values = kept(run, 1)
    assert sorted(values) == [(0, i) for i in range(24)]
    fit(resolve(dpo(tiny_base, tmp_path, "converted", model=conversions)))
    converted = kept(tmp_path / "runs" / "converted")
    assert min(abs(values[key] - converted[key]) for key in values) > 1e-3


def test_only_what_the_steps_read_is_looked_at_and_what_was_cut_is_told(tiny_base, tmp_path, capsys):
    recipe = dpo(tiny_base, tmp_path, trainer={"steps": 2})
    path = preferences(tmp_path)
    too_long = [{"prompt": "the " * 60, "chosen": "text", "rejected": "a page"}]
    too_long += [{"prompt": "the model", "chosen": "text", "rejected": "noisy words " * 30}]
    path.write_text(path.read_text() + "\n" + "\n".join(map(json.dumps, too_long)))
    fit(resolve(recipe))
    run = tmp_path / "runs" / "tiny"
    assert len(kept(run)) == 16
    (entry,) = json.loads((run / "data.json").read_text())["train"]
    assert (entry["documents"], entry["prompts_cut"], entry["pairs_too_long"]) == (14, 1, 1)
    shown = capsys.readouterr().out
    assert "1 pairs are longer than data.seq_len=64; their prompts lose the beginning" in shown
    assert "1 pairs are left out" in shown
    assert "1 pairs longer than a row" in (run / "report.html").read_text()


def test_resumed_in_the_middle_is_bit_exact(dropout_base, tmp_path, monkeypatch):
    """Dropout is on in training and off in the reference; what was kept is gone on with."""
    fit(resolve(dpo(dropout_base, tmp_path, "straight")))
    broken = dpo(dropout_base, tmp_path, "broken")
    with monkeypatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, 3)
        fit(resolve(broken))
    file = tmp_path / "runs" / "broken" / "start" / "stage-0.safetensors"
    before = file.read_bytes()
    fit(resolve(broken), "yes")
    assert file.read_bytes() == before
    runs = tmp_path / "runs"
    assert_same_run(runs / "straight", runs / "broken")


def test_stopped_while_it_looks_begins_again(tiny_base, tmp_path, monkeypatch):
    from adapt.train.hooks import Hooks

    fit(resolve(dpo(tiny_base, tmp_path, "straight")))
    broken = dpo(tiny_base, tmp_path, "broken")
    with monkeypatch.context() as patched, pytest.raises(StopRequested, match="before the first step of the stage"):
        patched.setattr(Hooks, "wants_stop", lambda self: True)
        fit(resolve(broken))
    assert not (tmp_path / "runs" / "broken" / "start").exists()
    fit(resolve(broken), "yes")
    runs = tmp_path / "runs"
    assert_same_run(runs / "straight", runs / "broken")


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_reference_that_is_lost_is_not_computed_from_the_trained_weights(damage, tiny_base, tmp_path, monkeypatch):
    recipe = dpo(tiny_base, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, 3)
        fit(resolve(recipe))
    file = tmp_path / "runs" / "tiny" / "start" / "stage-0.safetensors"
    if damage == "missing":
        shutil.rmtree(file.parent)
    else:
        file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    said = "is missing" if damage == "missing" else "is not the one this stage began with"
    with pytest.raises(UserError, match=rf"stage-0.safetensors {said}.*another run.name"):
        fit(resolve(recipe), "yes")


def test_more_steps_than_were_planned(tiny_base, tmp_path):
    """Pairs that were read already have their reference; new ones have none, and it is said before anything is trained."""
    short = dpo(tiny_base, tmp_path, trainer={"steps": 2})
    fit(resolve(short))
    with pytest.raises(UserError, match=r"was not among the 16 that the stage was to read.*export of this one"):
        fit(resolve(dpo(tiny_base, tmp_path, trainer={"steps": 3})), "yes")
    fit(resolve(dpo(tiny_base, tmp_path, "whole", trainer={"steps": 3})))
    assert fit(resolve(dpo(tiny_base, tmp_path, "whole", trainer={"steps": 5})), "yes") == 0
    assert sorted(losses(tmp_path / "runs" / "whole")) == [1, 2, 3, 4, 5]


def test_rewound_runs_have_the_pairs_they_read_on_to(tiny_base, tmp_path, monkeypatch):
    """A rewind leaves data out, and the end of the stage reads behind what its steps alone would."""
    from adapt.objectives.dpo import Dpo

    rewinding = {"non_finite": "rewind", "max_non_finite": 1, "steps": 2}
    recipe = dpo(tiny_base, tmp_path, trainer=rewinding) | {"checkpoint": {"every": 1}}
    call, calls = Dpo.__call__, []

    def broken(self, models, inputs):
        calls.append(1)
        found = call(self, models, inputs)
        return {k: v + math.inf for k, v in found.items()} if len(calls) == 4 else found  # dry run, step 1, in step 2

    monkeypatch.setattr(Dpo, "__call__", broken)
    fit(resolve(recipe))
    run = tmp_path / "runs" / "tiny"
    assert "rewound to step-1" in (run / "log.txt").read_text()
    assert len(kept(run)) == 24
    assert sorted(losses(run)) == [1, 2]


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_ranks_equal_one(tied, tmp_path):
    """FSDP2: the same reference and the same losses, a pair's rows on one rank."""
    base = tiny.save_tiny(tmp_path / "base", tie_word_embeddings=tied)
    over = {"schedule": {"name": "constant"}}
    fit(resolve(dpo(base, tmp_path, "one", trainer={"devices": 1}, **over)))
    done = launch(dpo(base, tmp_path, "two", trainer={"devices": 2, "microbatch": 2}, **over), tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    a, b = kept(one), kept(two)
    assert sorted(a) == sorted(b) == [(0, i) for i in range(24)]
    np.testing.assert_allclose([a[k] for k in sorted(a)], [b[k] for k in sorted(a)], rtol=1e-6)
    for key in ("loss", "loss/margin", "loss/accuracy"):
        left, right = logged(one, key), logged(two, key)
        assert max(abs(left[s] - right[s]) for s in left) < 1e-4
    assert losses(two)[1] == pytest.approx(math.log(2), rel=1e-7)


def test_a_live_reference_gives_the_run_of_the_kept_one(tiny_base, tmp_path):
    """`reference: teacher` with the base, where the student starts as the base."""
    fit(resolve(dpo(tiny_base, tmp_path, "start")))
    live = dpo(tiny_base, tmp_path, "live", {"name": "dpo", "beta": 0.5, "reference": "teacher"})
    fit(resolve(live | {"teacher": {"base": "self"}}))
    one, two = (tmp_path / "runs" / name for name in ("start", "live"))
    assert not (two / "start").exists()
    a, b = losses(one), losses(two)
    assert max(abs(a[s] - b[s]) for s in a) < 1e-5


def test_values_are_found_by_source_and_row():
    values = StartValues([(0, 4), (1, 4)], [1.5, -2.5])

    class Rows:
        source, sample_index = torch.tensor([1, 0, 1]), torch.tensor([4, 4, 4])

    assert values(Rows).tolist() == [-2.5, 1.5, -2.5]
    Rows.sample_index = torch.tensor([4, 4, 5])
    with pytest.raises(UserError, match=r"row 5 of data.train\[1\] was not among the 2"):
        values(Rows)
