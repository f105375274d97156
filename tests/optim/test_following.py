"""Momentum, decay and the like follow schedules: pure functions of the step, refused by name where nothing has them."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt.components import schedules
from adapt.config import decode, load, resolve
from adapt.config.schema import HyperSchedule
from adapt.config.text import read_yaml
from adapt.errors import StopRequested, UserError
from adapt.optim.following import Following, value_of
from adapt.train.fit import fit
from adapt.train.validate import problems
from tests import tiny
from tests.recipes import tiny_recipe
from tests.train.test_fit import assert_same_run, stop_after

TOTAL = 50


def recipe_of(tmp_path, optimizer_schedules, optimizer=None, **over):
    chosen = optimizer or {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1}
    made = tiny_recipe(tmp_path / "base", tmp_path, optimizer=chosen, objective="next_token", **over)
    made["model"].pop("conversions")
    return made | {"optimizer_schedules": optimizer_schedules, "generation": {}, "evaluation": {}}


class Plain(torch.optim.SGD):
    """Two groups as Muon's would be: one with a momentum, one without."""

    def __init__(self, betas=False):
        groups = [{"params": [torch.zeros(2)], "lr": 1.0, "momentum": 0.95, "role": "matrix", "weight_decay": 0.2}]
        groups += [{"params": [torch.zeros(2)], "lr": 0.1, "momentum": 0.0, "role": "norm", "weight_decay": 0.1}]
        super().__init__(groups)
        for group in self.param_groups:
            group |= {"betas": (0.9, 0.95)} if betas else {}


def following(tmp_path, optimizer, **wanted):
    recipe = resolve(recipe_of(tmp_path, wanted, schedule={"name": "linear", "warmup": 0})).recipe
    return Following(optimizer, recipe)


def test_momentum_warms_up_and_cools_down_between_two_values(tmp_path):
    """Muon's 0.85 -> 0.95 -> 0.85."""
    schedule = {"name": "wsd", "warmup": 10, "decay": 5}
    optimizer = Plain()
    one = following(tmp_path, optimizer, momentum={"schedule": schedule, "at_zero": 0.85})
    seen = [one.set(step, TOTAL)["momentum"] for step in range(TOTAL + 1)]
    assert seen[0] == pytest.approx(0.86)
    assert seen[9:46] == pytest.approx([0.95] * 37)
    assert seen[TOTAL] == pytest.approx(0.85)
    assert optimizer.param_groups[1]["momentum"] == 0.0, "what is off stays off"


def test_decay_falls_with_the_learning_rate(tmp_path):
    """`${schedule}` is the recipe's own, an override of it included."""
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe_of(tmp_path, {"weight_decay": {"schedule": "${schedule}"}})))
    recipe = load(str(file), ["schedule.name=linear", "schedule.final=0.5"]).recipe
    assert recipe.optimizer_schedules["weight_decay"].schedule == recipe.schedule
    optimizer = Plain()
    one = Following(optimizer, recipe)
    for step in range(TOTAL):
        one.set(step, TOTAL)
        factor = optimizer.param_groups[0]["lr"]
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.2 * factor)
        assert optimizer.param_groups[1]["weight_decay"] == pytest.approx(0.1 * factor)


def test_only_in_groups_of_some_roles(tmp_path):
    optimizer = Plain()
    wanted = {"schedule": {"name": "linear", "warmup": 0}, "roles": ["norm"]}
    following(tmp_path, optimizer, weight_decay=wanted).set(25, TOTAL)
    assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([0.2, 0.05])


def test_betas_of_torchs_own_optimizers_go_by_their_names(tmp_path):
    optimizer = Plain(betas=True)
    following(tmp_path, optimizer, beta2={"schedule": {"name": "linear", "warmup": 0}, "at_zero": 0.5}).set(25, TOTAL)
    assert optimizer.param_groups[0]["betas"] == pytest.approx((0.9, 0.725))


@settings(deadline=None, max_examples=25)
@given(steps=st.lists(st.integers(0, 60), min_size=1, max_size=8), name=st.sampled_from(sorted(schedules.names())))
def test_values_are_pure_functions_of_the_step(tmp_path_factory, steps, name):
    """Whatever was set before, and in whatever order."""
    wanted = {"momentum": {"schedule": name, "at_zero": 0.5}, "weight_decay": {"schedule": name}}
    folder, optimizer = tmp_path_factory.getbasetemp(), Plain()
    one = following(folder, optimizer, **wanted)
    for step in steps:
        one.set(step, TOTAL)
        following(folder, fresh := Plain(), **wanted).set(step, TOTAL)
        for ours, theirs in zip(optimizer.param_groups, fresh.param_groups, strict=True):
            assert all(ours[key] == theirs[key] for key in ("lr", "momentum", "weight_decay"))


@pytest.mark.parametrize(
    "wanted, where, what",
    [
        ({"momentun": {"schedule": "constant"}}, "optimizer_schedules.momentun", "It has"),
        ({"weight_decy": {"schedule": "constant"}}, "optimizer_schedules.weight_decy", "Did you mean 'weight_decay'?"),
        ({"lr": {"schedule": "constant"}}, "optimizer_schedules.lr", "section `schedule`"),
        ({"rank": {"schedule": "constant"}}, "optimizer_schedules.rank", "no group of adamw"),
        ({"beta1": {"schedule": "constant", "at_zero": 1.0}}, "optimizer_schedules.beta1.at_zero", "[0, 1)"),
        ({"eps": {"schedule": "constant", "roles": ["matrx"]}}, "optimizer_schedules.eps", "among the roles matrx"),
        (
            {"beta1": {"schedule": {"name": "wsd", "decay": 500}}},
            "optimizer_schedules.beta1.schedule.decay",
            "do not fit",
        ),
    ],
)
def test_what_cannot_follow_is_refused_by_name(wanted, where, what, tmp_path, tiny_base):
    recipe = recipe_of(tmp_path, wanted)
    recipe["model"]["base"] = str(tiny_base)
    found = {p.where: p.what for p in problems(resolve(recipe))}
    assert list(found) == [where], found
    assert what in found[where]


def test_a_decay_that_is_off_cannot_follow(tmp_path, tiny_base):
    recipe = recipe_of(tmp_path, {"weight_decay": {"schedule": "constant"}}, {"name": "adamw", "weight_decay": 0.0})
    recipe["model"]["base"] = str(tiny_base)
    assert [p.where for p in problems(resolve(recipe))] == ["optimizer_schedules.weight_decay"]


def test_unknown_keys_of_an_entry_are_named(tmp_path):
    with pytest.raises(UserError) as error:
        resolve(recipe_of(tmp_path, {"beta1": {"schedul": "constant"}, "eps": {"schedule": "constnt"}}))
    found = {p.where for p in error.value.problems}
    assert {"optimizer_schedules.beta1.schedul", "optimizer_schedules.eps.schedule"} <= found


def test_it_is_printed_and_overridden_like_any_section(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe_of(tmp_path, {"beta1": {"schedule": "constant", "at_zero": 0.5}})))
    resolved = load(str(file), ["optimizer_schedules.beta1.at_zero=0.25", "optimizer_schedules.eps={schedule: linear}"])
    assert resolved.recipe.optimizer_schedules["beta1"].at_zero == 0.25
    assert resolved.recipe.optimizer_schedules["eps"] == decode({"schedule": "linear"}, HyperSchedule)
    assert resolve(read_yaml(resolved.to_yaml())).stages == resolved.stages


def test_resumed_equals_uninterrupted_and_the_values_are_logged(tmp_path, monkeypatch):
    base = tiny.save_tiny(tmp_path / "base", attention_dropout=0.2)
    wanted = {
        "beta1": {"schedule": {"name": "constant", "warmup": 4}, "at_zero": 0.5},
        "weight_decay": {"schedule": {"name": "cosine", "warmup": 0, "final": 0}},
    }
    assert base == tmp_path / "base"
    optimizer = {"name": "adamw", "lr": 1e-2, "weight_decay": 10.0}
    straight, broken, plain = (
        recipe_of(tmp_path, wanted if name != "plain" else {}, optimizer, run={"name": name})
        for name in ("straight", "broken", "plain")
    )
    fit(resolve(straight))
    with monkeypatch.context() as patched, pytest.raises(StopRequested, match="after step 3"):
        stop_after(patched, 3)
        fit(resolve(broken))
    fit(resolve(broken), "yes")
    runs = tmp_path / "runs"
    assert_same_run(runs / "straight", runs / "broken")
    lines = [json.loads(line) for line in (runs / "broken" / "metrics.jsonl").read_text().splitlines()]
    momentum = [line["beta1"] for line in lines if "beta1" in line]
    assert momentum == pytest.approx([0.6, 0.7, 0.8, 0.9, 0.9, 0.9])
    fit(resolve(plain))
    with pytest.raises(AssertionError):
        assert_same_run(runs / "straight", runs / "plain")


def test_each_stage_follows_its_own(tmp_path, tiny_base):
    recipe = recipe_of(tmp_path, {}, trainer={"steps": 2})
    recipe["model"]["base"] = str(tiny_base)
    wanted = {"beta1": {"schedule": {"name": "constant", "warmup": 2}}}
    recipe["stages"] = [{"name": "a"}, {"name": "b", "optimizer_schedules": wanted}]
    fit(resolve(recipe))
    lines = [json.loads(x) for x in (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("beta1") for line in lines if "loss" in line] == pytest.approx([None, None, 0.45, 0.9])
    recipe["stages"][1]["optimizer_schedules"] = {"momentum": {"schedule": "constant"}}
    found = [p.where for p in problems(resolve(recipe))]
    assert found == ["stages[1] (b) optimizer_schedules.momentum"], "before the first stage, not at its own start"


def test_numbers_that_decide_what_the_state_looks_like_do_not_follow():
    assert value_of({"rank": 64}, "rank") is None
    assert value_of({"nesterov": True}, "nesterov") is None
    assert value_of({"gamma": 0.2}, "gamma") == 0.2
