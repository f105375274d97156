"""A run folder is never overwritten, and a resumed run is the same run."""

from __future__ import annotations

import json

import pytest
import yaml

from adapt.config import load
from adapt.errors import UserError
from adapt.runfolder import RunFolder
from tests.recipes import tiny_recipe


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tmp_path / "base", tmp_path)))
    return lambda *overrides: load(str(path), list(overrides))


def begin(resolved, resume="no", steps=1) -> RunFolder:
    """A run that got as far as `steps` logged steps."""
    folder = RunFolder.create(resolved, resume)
    folder.begin(resolved)
    (folder.path / "metrics.jsonl").write_text("".join(f'{{"step": {s}, "loss": 1.0}}\n' for s in range(steps)))
    return folder


def test_a_new_run_says_what_and_where_it_is(recipe):
    folder = begin(recipe())
    assert not folder.resumed
    assert folder.checkpoints.is_dir()
    assert json.loads((folder.path / "environment.json").read_text())["seed"] == 7
    again = RunFolder.open(folder.path)
    assert again.resolved().stages == recipe().stages


def test_an_existing_run_needs_resume_and_resume_needs_a_run(recipe):
    with pytest.raises(UserError, match="no run"):
        RunFolder.create(recipe(), "yes")
    assert not begin(recipe(), "auto").resumed
    with pytest.raises(UserError, match="--resume"):
        RunFolder.create(recipe(), "no")
    assert RunFolder.create(recipe(), "yes").resumed
    assert RunFolder.create(recipe(), "auto").resumed


def test_a_start_that_failed_before_its_first_step_may_be_made_again(recipe):
    begin(recipe(), steps=0)
    folder = begin(recipe("optimizer.lr=0.5"), steps=0)
    assert not folder.resumed
    assert folder.resolved().recipe.optimizer.config.lr == 0.5
    (folder.path.parent / "other").mkdir()
    (folder.path.parent / "other" / "precious.txt").write_text("x")
    with pytest.raises(UserError, match="not a run"):
        RunFolder.create(recipe("run.name=other"))


def test_a_full_disk_costs_log_lines_not_the_run(recipe, monkeypatch):
    folder = begin(recipe())
    (folder.path / "log.txt").unlink()
    (folder.path / "log.txt").symlink_to("/dev/full")
    with pytest.warns(UserWarning, match="cannot be written"):
        folder.log("a line")
    with pytest.raises(UserError, match=r"data\.json cannot be written"):
        (folder.path / ".data.json.partial").symlink_to("/dev/full")
        folder.write_json("data.json", {})


def test_what_a_resumed_run_may_change(recipe):
    begin(recipe())
    may = [
        "trainer.steps=9",
        "trainer.microbatch=1",
        "trainer.mesh.replicate=1",
        "logging.every=5",
        "checkpoint.keep=9",
    ]
    folder = begin(recipe(*may, "evaluation.limit=2", "export.dtype=bfloat16"), "yes")
    assert folder.resolved().recipe.trainer.steps == 9


def test_every_other_difference_is_refused_by_name(recipe):
    folder = begin(recipe())
    with pytest.raises(UserError) as caught:
        RunFolder.create(recipe("optimizer.lr=0.5", "run.seed=8", "data.train.0.weight=2", "trainer.steps=9"), "yes")
    text = str(caught.value)
    for word in ("optimizer.lr", "0.001", "0.5", "run.seed", "7", "8", "weight"):
        assert word in text
    assert "trainer.steps" not in text
    assert folder.resolved().recipe.trainer.steps == 6


def test_differences_inside_stages_are_refused(recipe):
    def staged(lr, steps):
        return recipe(f"stages=[{{name: a, optimizer: {{lr: {lr}}}}}, {{name: b, trainer: {{steps: {steps}}}}}]")

    begin(staged(1e-4, 3))
    RunFolder.create(staged(1e-4, 5), "yes")
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        RunFolder.create(staged(2e-4, 5), "yes")
    with pytest.raises(UserError, match="stages"):
        RunFolder.create(recipe(), "yes")


def test_other_ranks_write_nothing(recipe, tmp_path):
    folder = RunFolder.follow(recipe(), "no")
    folder.log("x")
    folder.write_json("x.json", {})
    assert not folder.path.exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder.open(tmp_path)
