"""Three stages of a linear student: its layers, its distribution, then text on rows four times as long (LAWCAT spec 3)."""

from __future__ import annotations

import json

import pytest

from adapt.config import resolve
from adapt.errors import StopRequested
from adapt.train.fit import fit
from adapt.train.teacher import build_teacher
from tests import tiny
from tests.recipes import tiny_recipe
from tests.train.test_fit import assert_same_run, stop_after

SCALING = {"rope_type": "linear", "factor": 2.0}
"""Of a base that has 64 positions: both the student and its teacher reach 128."""


def long_recipe(base, folder, **over):
    over = {
        "model": {
            "base": str(base),
            "conversions": [{"name": "lawcat", "layers": [0]}],
            "rope_scaling": SCALING,
        },
        "data": {"seq_len": 32},
        "trainer": {"steps": 2, "batch_tokens": 128},
        "objective": {"name": "attention_transfer"},
        "trainable": {"include": ["*.recurrence.*"]},
        "evaluation": {"suites": ["bpb"], "limit": 2},
        "generation": {"prompts": ["the model"], "samplers": ["ar"], "max_new_tokens": 6},
    } | over
    recipe = tiny_recipe(base, folder, **over)
    everything = {"include": ["*"]}
    recipe["stages"] = [
        {"name": "transfer"},
        {
            "name": "distillation",
            "objective": "logit_distillation",
            "teacher": {"base": "self"},
            "trainable": everything,
            "trainer": {"steps": 3},
        },
        {
            "name": "long",
            "objective": "next_token",
            "trainable": everything,
            "data": {"seq_len": 128},
            "trainer": {"steps": 3, "batch_tokens": 256},
        },
    ]
    return recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_tiny(tmp_path_factory.mktemp("base"), max_position_embeddings=64)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ADAPT_CACHE", str(folder / "cache"))
        assert fit(resolve(long_recipe(base, folder))) == 0
    return folder / "runs" / "tiny"


def test_each_stage_has_its_rows(run):
    """Tokens of a step are the stage's own, and what is exported has the positions of the longest rows."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.get("loss") is not None]
    assert [line["stage"] for line in steps] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [line["tokens"] for line in steps] == [128 * n for n in range(1, 6)] + [640 + 256 * n for n in range(1, 4)]
    assert all("loss/ar" in line and "loss/kl" not in line for line in steps[5:])
    config = json.loads((run / "export" / "config.json").read_text())
    assert config["max_position_embeddings"] == 128
    assert config["rope_parameters"]["factor"] == 2.0


def test_rows_longer_than_the_base_reaches_are_refused_without_scaling(base, tmp_path):
    from adapt.train.validate import problems

    recipe = long_recipe(base, tmp_path)
    recipe["model"]["rope_scaling"] = None
    assert ["128 is more than the 64 positions" in p.what for p in problems(resolve(recipe))] == [True]


def test_the_teacher_self_has_the_scaled_rope(base, tmp_path, tokenizer):
    """It reads the student's rows; an unscaled one would teach positions that it never saw."""
    from adapt.distributed.world import start

    stage = resolve(long_recipe(base, tmp_path)).stages[1]
    teacher = build_teacher(stage, tokenizer, start(1)).model
    assert teacher.config.rope_parameters["factor"] == 2.0
    assert teacher.config.max_position_embeddings == 128
    assert not hasattr(teacher.config, "token_mixers")


@pytest.mark.parametrize("step", [3, 6], ids=["distillation", "long"])
def test_a_run_stopped_inside_a_stage_goes_on_exactly(step, base, run, tmp_path, monkeypatch):
    recipe = long_recipe(base, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, step)
        fit(resolve(recipe))
    assert fit(resolve(recipe), "yes") == 0
    assert_same_run(run, tmp_path / "runs" / "tiny")
