"""Interpolation between start and end: exact at both, tied stays tied, chosen under limits, said everywhere."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from adapt.config import resolve
from adapt.config.schema import Bound, Interpolation
from adapt.errors import StopRequested, UserError
from adapt.train import interpolate
from adapt.train.deliver import export_run
from adapt.train.fit import fit
from adapt.train.interpolate import Ends, Point, between, choose
from adapt.train.validate import problems
from tests import tiny
from tests.train.test_fit import launch, stop_after, weights
from tests.train.test_teacher import dap, logged


def recipe_of(base, folder, *, interpolation, **over):
    found = dap(base, folder, kl=0.0, **over)
    found["export"] = {"dtype": "float32", "interpolation": interpolation}
    return found


@given(st.floats(0, 1), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.integers(0, 9))
def test_invariant_16_alpha_0_and_1_are_the_ends_bit_for_bit(alpha, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    first, last = (torch.randn(50, generator=generator).mul(10.0**seed).to(dtype) for _ in range(2))
    assert torch.equal(between(first, last, 0.0), first)
    assert torch.equal(between(first, last, 1.0), last)
    middle = between(first, last, alpha)
    assert middle.dtype == dtype
    expected = first.double() + alpha * (last.double() - first.double())
    scale = torch.maximum(first.double().abs(), last.double().abs())
    assert ((middle.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * scale).all()
    assert torch.equal(between(first, first, alpha), first)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tied", [True, False])
def test_invariant_16_through_a_run(alpha, tied, tmp_path):
    """The export at 0 is the base, at 1 the export without the section; tied weights are one matrix at any alpha."""
    base = tiny.save_tiny(tmp_path / "base", tie_word_embeddings=tied)
    fit(resolve(dap(base, tmp_path, kl=0.0, run={"name": "plain"})))
    fit(resolve(recipe_of(base, tmp_path, run={"name": "mixed"}, interpolation={"alpha": alpha, "alphas": []})))
    start, mixed = load_file(base / "model.safetensors"), weights(tmp_path / "runs" / "mixed")
    end = weights(tmp_path / "runs" / "plain")
    assert ("lm_head.weight" in mixed) != tied
    assert mixed.keys() == start.keys() == end.keys()
    for name, weight in mixed.items():
        assert torch.equal(weight, between(start[name], end[name], alpha)), name
    name = "model.embed_tokens.weight"
    assert not torch.equal(start[name], end[name])


def test_the_alpha_is_chosen_by_the_metric_under_limits():
    points = [Point(a, {"bpb/new": 2 - a, "forgetting/worst": a**2 / 10}) for a in (0.0, 0.25, 0.5, 0.75, 1.0)]
    best = Interpolation(minimise="bpb/new")
    assert choose(points, best)[0] == 1.0
    held = Interpolation(minimise="bpb/new", limits=(Bound(metric="forgetting/worst", at_most=0.03),))
    assert choose(points, held) == (0.5, "lowest bpb/new with forgetting/worst at most 0.03")
    never = Interpolation(minimise="bpb/new", limits=(Bound(metric="forgetting/worst", at_most=-1.0),))
    assert choose(points, never)[0] == 0.0
    assert "no alpha keeps" in choose(points, never)[1]
    assert choose(points, Interpolation(alpha=0.25))[0] == 0.25
    broken = [Point(0.0, {"bpb/new": float("nan")}), Point(1.0, {"bpb/new": 1.0})]
    assert choose(broken, best)[0] == 1.0


def test_the_sweep_is_said_everywhere(tiny_base, tmp_path, capsys):
    limits = [{"metric": "forgetting/worst", "at_most": -0.01}]
    wanted = {"alphas": [0, 0.5, 1], "minimise": "bpb/held-out", "limits": limits}
    fit(resolve(recipe_of(tiny_base, tmp_path, interpolation=wanted)))
    run, shown = tmp_path / "runs" / "tiny", capsys.readouterr().out
    found = json.loads((run / interpolate.FILE).read_text())
    assert [p["alpha"] for p in found["points"]] == [0.0, 0.5, 1.0]
    at = {p["alpha"]: p["results"] for p in found["points"]}
    assert at[0.0]["bpb/held-out"] == logged(run, "eval/bpb/held-out")[0]
    assert at[0.0]["forgetting/guard"] == 0.0
    assert at[1.0]["bpb/held-out"] == logged(run, "eval/bpb/held-out")[6]
    assert found["alpha"] == min((0.5, 1.0), key=lambda a: at[a]["bpb/held-out"])
    start, end = load_file(tiny_base / "model.safetensors"), weights(run)
    if found["alpha"] == 1.0:
        name = "model.norm.weight"
        moved = (end[name] - start[name]).norm() / start[name].norm()
        assert found["drift"]["norm"] == pytest.approx(moved.item(), rel=1e-5)
    assert set(found["drift"]) == {"embed_tokens", "layer 0", "layer 1", "norm"}
    assert all(value > 0 for value in found["drift"].values())
    assert "between start (alpha 0) and end (1)" in shown
    said = f"theta_0 + {found['alpha']:g} (theta_1 - theta_0)"
    for text in (shown, (run / "log.txt").read_text(), (run / "export" / "README.md").read_text()):
        assert said in text
    assert "| `bpb/held-out` |" in (run / "export" / "README.md").read_text()
    record = json.loads((run / "export" / "adapt.json").read_text())["results"]
    assert record["interpolation"]["alpha"] == found["alpha"]
    assert record["after"] == at[found["alpha"]]
    assert record["before"]["forgetting/guard"] == 0.0
    assert (run / "checkpoints" / "start" / "state.json").is_file()


def test_later_exports_and_a_second_sweep_give_the_same(tiny_base, tmp_path, capsys, monkeypatch):
    """`adapt export` repeats the choice; a run killed in the middle of its sweep makes it again when resumed."""
    recipe = recipe_of(tiny_base, tmp_path, interpolation={"alpha": 0.5, "alphas": [0, 1]})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        original, calls = Ends.set, []

        def killed(self, alpha):
            calls.append(alpha)
            if len(calls) == 2:
                raise KeyboardInterrupt
            original(self, alpha)

        patched.setattr(Ends, "set", killed)
        fit(resolve(recipe))
    assert not (tmp_path / "runs" / "tiny" / "export").exists()
    fit(resolve(recipe), "yes")
    run = tmp_path / "runs" / "tiny"
    capsys.readouterr()
    export_run(run, tmp_path / "again")
    assert "theta_0 + 0.5" in capsys.readouterr().out
    a, b = weights(run), load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert "theta_0 + 0.5" in (tmp_path / "again" / "README.md").read_text()
    longer = recipe | {"trainer": {**recipe["trainer"], "steps": 8}}
    with monkeypatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, 1)
        fit(resolve(longer), "yes")
    export_run(run, tmp_path / "third")
    assert "step-7 as it is (alpha 1)" in capsys.readouterr().out


def test_two_ranks_interpolate_their_shards(tiny_base, tmp_path):
    """As one process does."""
    wanted = {"alphas": [0, 1], "alpha": 0.3}
    for name, devices in (("one", 1), ("two", 2)):
        trainer = {"devices": devices, "steps": 2, "batch_tokens": 256}
        recipe = recipe_of(tiny_base, tmp_path, run={"name": name}, trainer=trainer, interpolation=wanted)
        if devices == 1:
            fit(resolve(recipe))
        else:
            done = launch(recipe, tmp_path)
            assert done.returncode == 0, done.stderr
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    a, b = weights(one), weights(two)
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    of_one, of_two = (json.loads((run / interpolate.FILE).read_text()) for run in (one, two))
    assert of_two["drift"] == pytest.approx(of_one["drift"], rel=1e-3)
    for p, q in zip(of_one["points"], of_two["points"], strict=True):
        assert q["results"] == pytest.approx(p["results"], abs=1e-4)


def test_a_start_that_was_not_kept_is_missed_by_name(tiny_base, tmp_path, monkeypatch):
    recipe = dap(tiny_base, tmp_path, kl=0.0)
    with monkeypatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, 2)
        fit(resolve(recipe))
    recipe["export"] = {"dtype": "float32", "interpolation": {"alpha": 0.5}}
    with pytest.raises(UserError, match=r"did not keep its start"):
        fit(resolve(recipe), "yes")


@pytest.mark.parametrize(
    "wanted, over, where",
    [
        ({}, {}, "export.interpolation"),
        ({"alpha": 0.5, "minimise": "bpb/held-out"}, {}, "export.interpolation"),
        ({"alpha": 1.5}, {}, "export.interpolation"),
        ({"alpha": 0.5, "limits": [{"metric": "bpb/guard", "at_most": 1}]}, {}, "export.interpolation.limits"),
        ({"minimise": "bpb/held-out", "alphas": []}, {}, "export.interpolation.alphas"),
        ({"minimise": "bpb/held"}, {}, "export.interpolation.minimise"),
        (
            {"minimise": "bpb/guard", "limits": [{"metric": "forgetting/held-out", "at_most": 1}]},
            {},
            "export.interpolation.limits[0].metric",
        ),
        ({"minimise": "bpb/held-out"}, {"evaluation": {}}, "evaluation.suites"),
        ({"alpha": 0.5}, {"trainable": {"lora": {"rank": 2}}}, "export.interpolation"),
    ],
)
def test_what_cannot_be_interpolated_is_refused(wanted, over, where, tiny_base, tmp_path):
    recipe = recipe_of(tiny_base, tmp_path, interpolation=wanted) | over
    assert [p.where for p in problems(resolve(recipe))] == [where]
