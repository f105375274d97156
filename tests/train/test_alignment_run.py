"""Runs whose layers learn the teacher's layer by layer first, then its distribution: RADLADS, MOHAWK, Zebra-Llama."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from adapt.config import resolve
from adapt.errors import StopRequested
from adapt.generation.load import open_model
from adapt.train.fit import fit
from tests import tiny
from tests.recipes import tiny_recipe
from tests.train.test_fit import assert_same_run, launch, losses, stop_after, weights

HYBRID = ({"name": "xecomla", "layers": [0], "kv_rank": 16}, {"name": "mamba2", "layers": [1, 2]})


def alignment(base, folder, conversions=HYBRID, **over):
    """Intermediate layers first (mixers and blocks), then logits, as Zebra-Llama is trained."""
    over = {
        "model": {"base": str(base), "conversions": [c | {} for c in conversions]},
        "objective": {"name": "layer_alignment", "block": 1.0, "distance": "norm"},
        "teacher": {"base": "self"},
        "optimizer": {"name": "adamw", "lr": 2e-3},
        "schedule": {"name": "constant"},
        "trainable": {"include": ["*.layers.*"]},
        "evaluation": {"suites": ["bpb", "kl_to_base"], "limit": 2},
        "generation": {"prompts": ["the model"], "samplers": ["ar"], "max_new_tokens": 6},
    } | over
    stages = [
        {"name": "alignment", "trainer": {"steps": 5}},
        {
            "name": "distillation",
            "objective": "logit_distillation",
            "trainable": {"include": ["*"]},
            "trainer": {"steps": 2},
        },
    ]
    recipe = tiny_recipe(base, folder, **over) | {"stages": stages}
    recipe["data"]["eval"][0]["guard"] = True
    return recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_tiny(tmp_path_factory.mktemp("base"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ADAPT_CACHE", str(folder / "cache"))
        assert fit(resolve(alignment(base, folder))) == 0
    return folder / "runs" / "tiny"


def logged(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_layers_come_nearer_and_each_says_how_near(run):
    first = [line for line in logged(run) if "loss/mixer" in line]
    assert len(first) == 5
    assert {key for key in first[0] if "relative" in key} == {
        "loss/relative_error", *(f"loss/relative_error/0{i}" for i in range(3))
    }  # fmt: skip
    assert all(first[-1][key] < first[0][key] for key in first[0] if "relative" in key)
    assert first[-1]["loss/block"] < first[0]["loss/block"]
    assert len([line for line in logged(run) if "loss/kl" in line]) == 2
    assert "relative error of the token mixer" in (run / "report.html").read_text()


def test_alignment_alone_brings_the_student_to_its_teacher(base, tmp_path):
    """The distribution comes nearer, though no logit is looked at; layers that stay, embedding and head stay the base's."""
    recipe = alignment(base, tmp_path)
    recipe["stages"] = recipe["stages"][:1]
    recipe["trainer"]["steps"] = 5
    assert fit(resolve(recipe)) == 0
    run = tmp_path / "runs" / "tiny"
    values = [line["eval/kl_to_base/held-out"] for line in logged(run) if "eval/kl_to_base/held-out" in line]
    assert values[-1] < 0.9 * values[0]
    before, after = load_file(base / "model.safetensors"), weights(run)
    assert all(torch.equal(before[n], after[n]) for n in before if ".layers." not in n or ".layers.3." in n)
    moved = {n.partition("layers.")[2] for n in before if n in after and not torch.equal(before[n], after[n])}
    assert {"0.mlp.up_proj.weight", "1.self_attn.q_proj.weight", "2.self_attn.o_proj.weight"} <= moved


def test_the_hybrid_is_exported_and_decodes(run):
    model = open_model(str(run)).model
    assert model.config.token_mixers == ["latent", "mamba2", "mamba2", "attention"]
    ids = torch.arange(4, 40)[None]
    same = [model.generate(ids, use_cache=c, max_new_tokens=6, do_sample=False).tolist() for c in (True, False)]
    assert same[0] == same[1]


@pytest.mark.parametrize("step", [3, 6], ids=["alignment", "distillation"])
def test_a_run_stopped_inside_a_stage_goes_on_exactly(step, base, run, tmp_path, monkeypatch):
    recipe = alignment(base, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, step)
        fit(resolve(recipe))
    assert fit(resolve(recipe), "yes") == 0
    assert_same_run(run, tmp_path / "runs" / "tiny")


def test_two_ranks_equal_one(base, run, tmp_path):
    """Student and teacher sharded, layers called one by one on both, one that is not converted never on the student."""
    recipe = alignment(base, tmp_path)
    recipe["trainer"] |= {"devices": 2, "microbatch": 1}
    check_two_ranks(recipe, run, tmp_path)


def test_two_ranks_equal_one_with_the_stock_class(base, tmp_path):
    """DeepseekV3, mixers alone, with layers recomputed in the backward pass."""
    over = {
        "objective": {"name": "layer_alignment"},
        "trainable": {"include": ["*.self_attn.*"]},
        "trainer": {"activation_checkpointing": True},
        "evaluation": {"suites": []},
        "generation": {"prompts": [], "samplers": ["ar"]},
    }
    conversions = ({"name": "xecomla", "kv_rank": 16},)
    assert fit(resolve(alignment(base, tmp_path, conversions, **over))) == 0
    recipe = alignment(base, tmp_path, conversions, **over, run={"name": "two"})
    recipe["trainer"] |= {"devices": 2, "microbatch": 1}
    check_two_ranks(recipe, tmp_path / "runs" / "tiny", tmp_path)


def check_two_ranks(recipe, one, folder):
    done = launch(recipe, folder)
    assert done.returncode == 0, done.stderr
    two = folder / "runs" / recipe["run"]["name"]
    a, b = losses(one), losses(two)
    assert a.keys() == b.keys()
    assert max(abs(a[s] - b[s]) / a[s] for s in a) < 1e-4
    x, y = weights(one), weights(two)
    assert max((x[k] - y[k]).abs().max() for k in x) < 2e-4
