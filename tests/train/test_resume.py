"""Ends and beginnings of runs: finished ones go on or say so, stages keep their data, and nothing is lost in between."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapt.config import resolve
from adapt.distributed import checkpoint
from adapt.errors import StopRequested, UserError
from adapt.objectives.block_diffusion import BlockDiffusion
from adapt.train.fit import fit
from tests import tiny
from tests.recipes import corpus, tiny_recipe
from tests.train.test_fit import assert_same_run, launch, losses, stop_after, weights


@pytest.fixture
def dropout_base(tmp_path):
    return tiny.save_tiny(tmp_path / "base", attention_dropout=0.2)


def data_of(run: Path) -> dict:
    return json.loads((run / "data.json").read_text())


def test_a_finished_run_resumes_to_its_export(tiny_base, tmp_path, capsys):
    """A second `make demo`, or a run killed while it exported: nothing is trained again, everything is shown again."""
    recipe = tiny_recipe(tiny_base, tmp_path, trainer={"steps": 2, "batch_tokens": 256})
    fit(resolve(recipe))
    run = tmp_path / "runs" / "tiny"
    before = weights(run)
    (run / "export" / "model.safetensors").unlink()
    assert fit(resolve(recipe), "auto") == 0
    assert all(torch.equal(before[k], v) for k, v in weights(run).items())
    assert sorted(losses(run)) == [1, 2]
    assert "done before" in capsys.readouterr().out


def test_a_finished_run_goes_on_when_steps_are_added(dropout_base, tmp_path):
    """With a constant rate, 3 steps and then 3 more are 6 steps."""
    over = {"schedule": {"name": "constant"}}
    straight = tiny_recipe(dropout_base, tmp_path, run={"name": "straight"}, **over)
    fit(resolve(straight))
    longer = tiny_recipe(dropout_base, tmp_path, run={"name": "longer"}, **over)
    fit(resolve(longer | {"trainer": {**longer["trainer"], "steps": 3}}))
    fit(resolve(longer), "yes")
    runs = tmp_path / "runs"
    assert_same_run(runs / "straight", runs / "longer")


def test_stopped_before_the_first_step_is_still_exact(dropout_base, tmp_path, monkeypatch):
    """A checkpoint of step 0 has no optimizer state; one made up for it would count a step that never was."""
    straight = tiny_recipe(dropout_base, tmp_path, run={"name": "straight"})
    fit(resolve(straight))
    broken = tiny_recipe(dropout_base, tmp_path, run={"name": "broken"})
    broken["evaluation"] |= {"best": "bpb/held-out"}  # saves the start as the best so far
    with monkeypatch.context() as patched, pytest.raises(StopRequested, match="after step 1"):
        stop_after(patched, 1)
        fit(resolve(broken))
    folder = tmp_path / "runs" / "broken" / "checkpoints"
    assert {p.name for p in checkpoint.checkpoints(folder)} == {"step-0", "step-1"}
    import shutil

    shutil.rmtree(folder / "step-1")
    fit(resolve(broken), "yes")
    assert losses(tmp_path / "runs" / "broken") == losses(tmp_path / "runs" / "straight")


@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_resume_at_the_edge_of_two_stages(moments, dropout_base, tmp_path, monkeypatch):
    """Killed right behind a stage's last checkpoint: the next one starts as it would have."""
    stages = [
        {"name": "a", "trainer": {"steps": 2}},
        {"name": "b", "trainer": {"steps": 2}, "optimizer_state": moments},
    ]
    straight = tiny_recipe(dropout_base, tmp_path, run={"name": "straight"}) | {"stages": stages}
    fit(resolve(straight))
    broken = tiny_recipe(dropout_base, tmp_path, run={"name": "broken"}) | {"stages": stages}
    from adapt.train import fit as module

    original = module._Run._stage

    def killed(self, recipe, before, *, last):
        if last:
            raise KeyboardInterrupt
        return original(self, recipe, before, last=last)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module._Run, "_stage", killed)
        fit(resolve(broken))
    fit(resolve(broken), "yes")
    runs = tmp_path / "runs"
    assert_same_run(runs / "straight", runs / "broken")


def test_each_stage_trains_on_its_own_data(tiny_base, tmp_path, capsys):
    """Stages A, B, A: the third is back on A's data, and the manifest of the run lists both."""
    recipe = tiny_recipe(tiny_base, tmp_path, trainer={"steps": 1, "batch_tokens": 256})
    other = corpus(tmp_path, 25, seed=5)
    data = {"train": [{"source": {"name": "jsonl", "path": str(other)}, "name": "other"}]}
    stages = [{"name": "a"}, {"name": "b", "data": data}, {"name": "c"}]
    fit(resolve(recipe | {"stages": stages}))
    at_hand = [line for line in capsys.readouterr().out.splitlines() if "training tokens at hand" in line]
    assert len(at_hand) == 3
    assert at_hand[0] == at_hand[2] != at_hand[1]
    run = tmp_path / "runs" / "tiny"
    assert [entry["label"] for entry in data_of(run)["train"]] == ["train", "other"]
    assert "other" in (run / "export" / "README.md").read_text()


def test_changed_data_is_refused_by_name_before_anything_is_written(tiny_base, tmp_path, monkeypatch):
    recipe = tiny_recipe(tiny_base, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, 2)
        fit(resolve(recipe))
    before = data_of(tmp_path / "runs" / "tiny")
    path = Path(recipe["data"]["train"][0]["source"]["path"])
    path.write_text(path.read_text() + '\n{"text": "a document that was not there before, long enough to count here"}')
    with pytest.raises(UserError, match=r"data\.train\[0\] \(train\)"):
        fit(resolve(recipe), "yes")
    assert data_of(tmp_path / "runs" / "tiny") == before


def test_the_best_checkpoint_may_be_the_start(tiny_base, tmp_path):
    """A run that only got worse exports what it started from, and its results say so."""
    recipe = tiny_recipe(tiny_base, tmp_path, trainer={"steps": 3, "batch_tokens": 256, "clip": None})
    recipe |= {"optimizer": {"name": "adamw", "lr": 5.0}}
    recipe["evaluation"] |= {"best": "bpb/held-out"}
    fit(resolve(recipe))
    run = tmp_path / "runs" / "tiny"
    before = load_file(tiny_base / "model.safetensors")
    exported = weights(run)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(exported[name], before[name])
    state = checkpoint.read_state(checkpoint.checkpoints(run / "checkpoints")[-1])
    card = (run / "export" / "README.md").read_text()
    shown = f"{state['results']['before']['bpb/held-out']:.4g}"
    assert f"`bpb/held-out` | {shown} | {shown}" in card


def test_an_infinite_loss_with_finite_gradients_is_noticed(tiny_base, tmp_path, monkeypatch):
    call = BlockDiffusion.__call__
    monkeypatch.setattr(BlockDiffusion, "__call__", lambda *a: {k: v + float("inf") for k, v in call(*a).items()})
    with pytest.raises(UserError, match=r"step 0: the loss term .* not finite"):
        fit(resolve(tiny_recipe(tiny_base, tmp_path)))


def test_a_checkpoint_moved_aside_by_a_killed_save_comes_back(tmp_path):
    (tmp_path / ".replaced-step-4").mkdir()
    (tmp_path / ".replaced-step-4" / "state.json").write_text("{}")
    (tmp_path / ".partial-step-4").mkdir()
    (tmp_path / "step-2").mkdir()
    (tmp_path / ".replaced-step-2").mkdir()
    checkpoint.recover(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step-2", "step-4"]
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-4"]


def test_max_time_counts_from_the_start_and_stops_in_the_same_step(tiny_base, tmp_path):
    recipe = tiny_recipe(tiny_base, tmp_path, trainer={"steps": 6, "batch_tokens": 256, "max_time": "00:00:00"})
    with pytest.raises(StopRequested, match=r"max_time=00:00:00.* after step 1"):
        fit(resolve(recipe))


def test_an_error_of_the_user_is_told_once_by_all_ranks(tiny_base, tmp_path):
    recipe = tiny_recipe(tiny_base, tmp_path, trainer={"devices": 2, "steps": 1})
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "precious.txt").write_text("x")
    done = launch(recipe, tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert "rank 1" not in done.stderr


def test_a_stage_on_the_same_data_reads_on(tiny_base, tmp_path, monkeypatch):
    """Two stages of two steps see the rows that one of four sees; new data begins at its beginning."""
    from adapt.train import module

    seen: list[list[int]] = []
    original = module.gradients

    def gradients(root, objective, batch, **kwargs):
        seen.append(batch.sample_index.tolist())
        return original(root, objective, batch, **kwargs)

    monkeypatch.setattr(module, "gradients", gradients)
    plain = tiny_recipe(tiny_base, tmp_path, run={"name": "one"}, trainer={"steps": 4, "batch_tokens": 256})
    fit(resolve(plain))
    one, seen[:] = list(seen), []
    staged = tiny_recipe(tiny_base, tmp_path, run={"name": "two"}, trainer={"steps": 2, "batch_tokens": 256})
    fit(resolve(staged | {"stages": [{"name": "a"}, {"name": "b"}]}))
    assert seen == one
    two, seen[:] = list(seen), []
    other = {"train": [{"source": {"name": "jsonl", "path": str(corpus(tmp_path, 60, seed=5))}}]}
    third = tiny_recipe(tiny_base, tmp_path, run={"name": "three"}, trainer={"steps": 1, "batch_tokens": 256})
    fit(resolve(third | {"stages": [{"name": "a"}, {"name": "b", "data": other}]}))
    assert seen[0] == two[0]


def test_keep_takes_each_parameters_own_moments(tiny_base, tmp_path):
    """The second stage trains other parameters too: those it shares with the first keep their moments, by name."""
    few = {"include": ["*mlp*"]}
    stages = [
        {"name": "a", "trainer": {"steps": 2}, "trainable": few},
        {"name": "b", "trainer": {"steps": 2}, "optimizer_state": "keep", "trainable": {"include": ["*"]}},
    ]
    assert fit(resolve(tiny_recipe(tiny_base, tmp_path) | {"stages": stages})) == 0


def test_a_rule_that_the_start_meets_ends_nothing_and_hides_no_signal(tiny_base, tmp_path, monkeypatch):
    recipe = tiny_recipe(tiny_base, tmp_path)
    recipe["evaluation"] |= {"stop": [{"metric": "bpb/held-out", "above": 0.0}]}
    with monkeypatch.context() as patched, pytest.raises(StopRequested, match="after step 2"):
        stop_after(patched, 2)
        fit(resolve(recipe))


def test_a_prompt_that_cannot_be_decoded_does_not_cost_the_export(tiny_base, tmp_path):
    recipe = tiny_recipe(tiny_base, tmp_path, trainer={"steps": 1, "batch_tokens": 256})
    recipe["generation"] |= {"prompts": ["the model " * 2000]}
    with pytest.raises(UserError, match="context"):
        fit(resolve(recipe))
    assert (tmp_path / "runs" / "tiny" / "export" / "model.safetensors").is_file()


def test_a_killed_export_is_in_nobodys_way(tiny_base, tmp_path):
    recipe = tiny_recipe(tiny_base, tmp_path, trainer={"steps": 1, "batch_tokens": 256})
    left = tmp_path / "runs" / "tiny" / "export.new"
    fit(resolve(recipe))
    left.mkdir()
    (left / "half").write_text("x")
    assert fit(resolve(recipe), "yes") == 0
    assert not left.exists()


def test_adapters_start_alike_on_all_ranks(tiny_base, tmp_path):
    """2 ranks = 1 with LoRA, whose weights are drawn: seeded, or every rank would have its own."""
    over = {"trainable": {"lora": {"rank": 4, "targets": ["q_proj", "v_proj"]}}}
    for name, devices in (("one", 1), ("two", 2)):
        recipe = tiny_recipe(tiny_base, tmp_path, run={"name": name}, trainer={"devices": devices, "steps": 3}, **over)
        done = launch(recipe | {"evaluation": {}}, tmp_path)
        assert done.returncode == 0, done.stderr
    a, b = (losses(tmp_path / "runs" / n) for n in ("one", "two"))
    assert max(abs(a[s] - b[s]) for s in a) < 2e-5 * max(a.values())


def test_rows_that_fit():
    """Linear in the rows, a tenth and what training adds later left free, never less than one nor more than there are."""
    from adapt.train.probe import rows_that_fit

    assert rows_that_fit(one=10, two=14, room=100, to_come=20, rows=64) == 1 + (90 - 20 - 10) // 4
    assert rows_that_fit(one=10, two=14, room=100, to_come=20, rows=8) == 8
    assert rows_that_fit(one=10, two=14, room=12, to_come=20, rows=8) == 1
