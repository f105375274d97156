"""Several arms of one recipe: each a run of its own, one page of all; what is done stays, what failed is named."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from adapt.config import load, resolve
from adapt.config.text import read_yaml
from adapt.errors import StopRequested, UserError
from adapt.runfolder import ARMS as RECIPE
from adapt.runfolder import COMPARISON
from adapt.train.arms import fit_arms, is_done
from adapt.train.fit import fit
from adapt.train.validate import check, problems
from tests.recipes import tiny_recipe
from tests.train.test_fit import ROOT, assert_same_run, losses, stop_after

ARMS = {"low": {"optimizer": {"lr": 1e-4}}, "high": {"optimizer": {"lr": 1e-2}}}


@pytest.fixture
def recipe(tiny_base, tmp_path):
    made = tiny_recipe(tiny_base, tmp_path, objective="next_token", trainer={"steps": 3}) | {"arms": ARMS}
    return made | {"model": {"base": str(tiny_base)}, "generation": {}, "evaluation": {"suites": ["bpb"], "limit": 2}}


@pytest.fixture
def file(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return str(path)


def here(file: Path, name: str, go_on: bool, index: int) -> int:
    """An arm in this process: what its own process would do."""
    try:
        return fit(load(str(file), [f"arm={name}"]), "auto" if go_on else "no")
    except (UserError, StopRequested) as error:
        return error.exit_code


def where(found) -> dict[str, str]:
    return {p.where: p.what for p in found}


def test_an_arm_is_the_recipe_with_its_own_sections(file, tmp_path):
    resolved = load(file)
    assert list(resolved.arms) == ["low", "high"]
    for name, arm in resolved.arms.items():
        assert (arm.recipe.run.dir, arm.recipe.run.name) == (str(tmp_path / "runs" / "tiny"), name)
        assert arm.recipe.optimizer.config.lr == ARMS[name]["optimizer"]["lr"]
        assert (arm.recipe.data, arm.recipe.run.seed) == (resolved.recipe.data, resolved.recipe.run.seed)
        assert not arm.arms
    assert (resolved.recipe.run.dir, resolved.recipe.run.name) == (str(tmp_path / "runs"), "tiny")


def test_an_override_is_for_all_arms_or_for_one(file):
    both = load(
        file, ["optimizer.weight_decay=0.5", "arms.high.optimizer.lr=0.5", "optimizer.lr=0.25", "trainer.steps=2"]
    )
    assert [arm.recipe.optimizer.config.weight_decay for arm in both.arms.values()] == [0.5, 0.5]
    assert [arm.recipe.optimizer.config.lr for arm in both.arms.values()] == [0.25, 0.5]
    assert [arm.recipe.trainer.steps for arm in both.arms.values()] == [2, 2]


def test_one_arm_or_none(file):
    one = load(file, ["arm=high"])
    assert not one.arms
    assert (one.recipe.run.name, one.recipe.optimizer.config.lr) == ("high", 1e-2)
    plain = load(file, ["arms=null"])
    assert not plain.arms
    assert (plain.recipe.run.name, plain.recipe.optimizer.config.lr) == ("tiny", 1e-3)
    assert list(load(file, ["arms.low=null"]).arms) == ["high"]
    with pytest.raises(UserError) as error:
        load(file, ["arm=hihg"])
    assert "Did you mean 'high'?" in where(error.value.problems)["arm"]


def test_an_arm_of_another_component_takes_nothing_from_the_recipes(file):
    arm = {"schedule": {"name": "wsd", "decay": 2}}
    resolved = load(file, [f"arms.wsd={json.dumps(arm)}"])
    assert resolved.arms["wsd"].recipe.schedule.name == "wsd"
    assert resolved.arms["low"].recipe.schedule.name == "cosine"


def test_printed_and_loaded_again_it_is_the_same(file, recipe):
    recipe["arms"] = ARMS | {
        "staged": {"stages": [{"name": "a", "trainer": {"steps": 1}}, {"name": "b", "trainer": {"steps": 2}}]}
    }
    resolved = resolve(recipe)
    again = resolve(read_yaml(resolved.to_yaml()))
    assert list(again.arms) == list(resolved.arms)
    assert all(again.arms[name].stages == arm.stages for name, arm in resolved.arms.items())
    assert again.recipe == resolved.recipe


def test_every_problem_of_every_arm_at_once(recipe):
    recipe["arms"] = {
        "low": {"optimizer": {"lrr": 1}},
        "high": {"optimizer": {"lr": "fast"}},
        "data": {"data": {"seq_len": 8}},
        "no.name": {},
        "list": [1],
    }
    recipe["trainer"]["stepz"] = 1
    with pytest.raises(UserError) as error:
        resolve(recipe)
    found = where(error.value.problems)
    assert "Did you mean 'lr'?" in found["arms.low.optimizer.lrr"]
    assert "expected a number" in found["arms.high.optimizer.lr"]
    assert "may override only" in found["arms.data.data"]
    assert {"arms.no.name", "arms.list"} <= found.keys()
    assert [key for key in found if "stepz" in key] == ["trainer.stepz"], "what is wrong for all is said once"


def test_validate_checks_every_arm(recipe):
    recipe["arms"] = ARMS | {
        "wrong": {"optimizer": {"lr": -1.0}},
        "long": {"trainer": {"steps": 4}},
        "twin": {"optimizer": {"lr": 1e-4}},
    }
    recipe["data"]["max_bad_lines"] = 2.0
    found = where(problems(resolve(recipe)))
    assert found.keys() == {
        "data.max_bad_lines",
        "arms.wrong.optimizer.lr",
        "arms.long.trainer",
        "arms.twin",
    }
    assert "same as arms.low" in found["arms.twin"]
    assert "1,024 tokens, and arms.low on 768" in found["arms.long.trainer"]


def test_arms_may_read_no_other_data(recipe, tmp_path):
    data = {"seq_len": 32}
    recipe["arms"] = ARMS | {"other": {"stages": [{"name": "a", "data": data}]}}
    assert "other data" in where(problems(resolve(recipe)))["arms.other"]


def test_a_recipe_with_a_wrong_arm_is_checked_further(recipe):
    from adapt.train.validate import further

    recipe["arms"] = ARMS | {"wrong": {"optimizer": {"lrr": 1}}}
    recipe["data"]["max_bad_lines"] = 2.0
    with pytest.raises(UserError) as error:
        resolve(recipe)
    assert "data.max_bad_lines" in where(further(error.value))


def test_every_arm_is_a_run_and_one_page_compares_them(recipe, tmp_path, capsys):
    assert fit_arms(resolve(recipe), start=here) == 0
    folder = tmp_path / "runs" / "tiny"
    for name in ARMS:
        assert {"config.yaml", "metrics.jsonl", "report.html", "export"} <= set(os.listdir(folder / name))
        assert sorted(losses(folder / name)) == [1, 2, 3]
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        kept = [line["optimizer_state_bytes"] for line in lines if "optimizer_state_bytes" in line]
        assert len(kept) == 1, "told once"
    assert losses(folder / "low")[1] == losses(folder / "high")[1], "the same data, from the same start"
    html = (folder / COMPARISON).read_text()
    section = html[html.index('<section id="arms">') :]
    section = section[: section.index("</section>")]
    for axis in ("optimizer steps", "training tokens", "seconds of training"):
        assert f"loss against {axis}" in section
        assert f"bpb/held-out against {axis}" in section
    for name in ARMS:
        assert re.search(rf"</span>{name}</span></td>.*MiB", section)
    assert str(folder / COMPARISON) in capsys.readouterr().out
    assert resolve(read_yaml((folder / RECIPE).read_text())).arms.keys() == ARMS.keys()
    with pytest.raises(UserError) as error:
        fit_arms(resolve(recipe), start=here)
    assert {"arms.low.run.name", "arms.high.run.name"} == where(error.value.problems).keys()


def test_an_arm_equals_the_run_it_would_be_alone(recipe, tmp_path):
    fit_arms(resolve(recipe), start=here)
    alone = recipe | {
        "arms": None,
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "run": recipe["run"] | {"name": "alone"},
    }
    fit(resolve(alone))
    assert_same_run(tmp_path / "runs" / "tiny" / "high", tmp_path / "runs" / "alone")


def test_interrupted_it_goes_on_with_that_arm_and_leaves_the_others(recipe, tmp_path, monkeypatch, capsys):
    straight = recipe | {"run": recipe["run"] | {"name": "straight"}}
    fit_arms(resolve(straight), start=here)
    started = []

    def start(file, name, go_on, index):
        started.append(name)
        if name == "high" and not go_on:
            stop_after(monkeypatch, 2)
        return here(file, name, go_on, index)

    with monkeypatch.context() as monkeypatch, pytest.raises(StopRequested, match="in arm high"):
        fit_arms(resolve(recipe), start=start)
    runs = tmp_path / "runs"
    done = {name: is_done(arm) for name, arm in resolve(recipe).arms.items()}
    assert done == {"low": True, "high": False}
    before = (runs / "tiny" / "low" / "report.html").stat().st_mtime_ns
    started.clear()
    assert fit_arms(resolve(recipe), "auto", start=start) == 0
    assert started == ["high"]
    assert (runs / "tiny" / "low" / "report.html").stat().st_mtime_ns == before
    for name in ARMS:
        assert_same_run(runs / "tiny" / name, runs / "straight" / name)
    assert fit_arms(resolve(recipe), "yes", start=start) == 0
    assert started == ["high"], "nothing is left to do"
    recipe["trainer"]["steps"] = 4
    assert not any(is_done(arm) for arm in resolve(recipe).arms.values()), "steps were added"


def test_a_failed_arm_is_named_and_the_others_still_run(recipe, tmp_path, capsys):
    def start(file, name, go_on, index):
        return 2 if name == "low" else here(file, name, go_on, index)

    assert fit_arms(resolve(recipe), start=start) == 2
    told = capsys.readouterr().err
    assert "arm low ended with exit code 2" in told
    assert "1 of 2 arms failed: low" in told
    assert sorted(losses(tmp_path / "runs" / "tiny" / "high")) == [1, 2, 3]
    assert fit_arms(resolve(recipe), "auto", start=here) == 0
    assert sorted(losses(tmp_path / "runs" / "tiny" / "low")) == [1, 2, 3]


def test_a_second_ctrl_c_starts_no_other_arm(recipe):
    started = []
    assert fit_arms(resolve(recipe), start=lambda file, name, go_on, index: started.append(name) or 130) == 130
    assert started == ["low"]


def test_what_any_arm_would_refuse_is_refused_before_the_first(recipe, tmp_path):
    with pytest.raises(UserError) as error:
        fit_arms(resolve(recipe), "yes", start=here)
    assert "there is no arm" in where(error.value.problems)["--resume"]
    fit_arms(resolve(recipe), start=here)
    recipe["arms"] = ARMS | {"high": {"optimizer": {"lr": 5e-3}}}
    with pytest.raises(UserError) as error:
        fit_arms(resolve(recipe), "auto", start=here)
    assert "arms.high.optimizer.lr" in where(error.value.problems)
    assert "arms.low" not in "".join(where(error.value.problems))


def test_from_the_command_line_with_ctrl_c(file, tmp_path):
    """Each arm in a process of its own; a Ctrl-C at the command reaches the arm, which saves, and all ends with 75."""
    command = [sys.executable, "-m", "adapt", "fit", "-c", file, "trainer.steps=400", "--resume=auto"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    metrics = tmp_path / "runs" / "tiny" / "low" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.is_file() and '"loss"' in metrics.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=250)
    assert process.returncode == 75, told
    assert "stopped in arm low" in told
    assert len(list((tmp_path / "runs" / "tiny" / "low" / "checkpoints").glob("step-*"))) == 1
    assert not (tmp_path / "runs" / "tiny" / "high").exists()


@pytest.mark.slow
def test_under_torchrun_the_ranks_of_each_arm_meet(file, tmp_path):
    """Two ranks equal one, arm by arm."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = ["-m", "adapt", "fit", "-c", file, "run.name=two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *two], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert fit_arms(load(file, ["run.name=one"]), start=here) == 0
    for name in ARMS:
        one, two = (losses(tmp_path / "runs" / run / name) for run in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-4)
    assert (tmp_path / "runs" / "two" / COMPARISON).is_file()


def test_arms_are_listed_by_validate(recipe):
    assert any(line.startswith("2 arms") for line in check(resolve(recipe)).checked)
