"""The command line: quick help, one letter with every problem, the exit codes of the design."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from adapt import __version__, cli
from adapt.console import print_problems, printable
from adapt.errors import Problem, StopRequested, UserError
from tests.recipes import tiny_recipe

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "lightning", "yaml", "omegaconf", "cattrs", "rich", "numpy", "jinja2", "matplotlib")


@pytest.fixture
def recipe_file(tiny_base, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tiny_base, tmp_path)))
    return str(path)


def loaded_after(argv: list[str]) -> tuple[str, set[str]]:
    """Standard output of a fresh process that runs `adapt ARGV`, and the heavy modules it has loaded by then."""
    code = f"import sys; from adapt.cli import main; main({argv!r}); print('\\nLOADED', *sorted(set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    text, _, loaded = done.stdout.rpartition("LOADED")
    return text, set(loaded.split())


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["fit", "--help"], ["report", "--help"], []])
def test_help_imports_nothing_heavy(argv):
    assert not loaded_after(argv)[1] & set(HEAVY)


@pytest.mark.parametrize("argv", [["generate", "--help"], ["evaluate", "--help"]])
def test_help_of_model_verbs_imports_no_model_code(argv):
    assert not loaded_after(argv)[1] & {"torch", "transformers", "lightning"}


def test_validate_imports_no_lightning(recipe_file):
    text, loaded = loaded_after(["validate", "-c", recipe_file])
    assert "lightning" not in loaded
    assert "# ✓" in text


def test_every_verb_explains_itself(capsys):
    for verb in cli.VERBS:
        assert cli.main([verb, "--help"]) == 0
        assert f"adapt {verb}" in capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in cli.VERBS)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"adapt {__version__}\n"


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "usage"),
        (["ft"], "Did you mean 'fit'?"),
        (["fit"], "-c/--config"),
        (["fit", "-c", "nowhere.yaml"], "nowhere.yaml"),
        (["fit", "-c", "nbdiff", "--optimizer.lr=3"], "without dashes"),
        (["fit", "-c", "nbdiff", "--resume=maybe"], "maybe"),
        (["data", "eat", "-c", "nbdiff"], "eat"),
        (["report", "nowhere"], "not a run folder"),
        (["export", "nowhere", "--to", "x"], "not a run folder"),
    ],
)
def test_wrong_usage_is_exit_code_2(argv, said, capsys):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert said in out + err
    assert "Traceback" not in err


def test_all_problems_on_their_own_lines(recipe_file, capsys):
    argv = ["-c", recipe_file, "trainer.batch_tokens=100", "optimizer.lr=-1", "logging.every=0", "trainer.tokens=5"]
    for verb in ("validate", "fit"):
        assert cli.main([verb, *argv]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        keys = sorted(line.split(":")[1].strip() for line in lines)
        assert keys == ["logging.every", "optimizer.lr", "trainer", "trainer.batch_tokens"]
        assert any("try 128" in line for line in lines)


def test_validate_prints_a_recipe(recipe_file, capsys):
    """Its output, ticks included, is the resolved recipe; options and overrides come in any order."""
    from adapt.config import load

    assert cli.main(["validate", "run.seed=3", "-c", recipe_file, "data.seq_len=128", "--offline"]) == 0
    shown = capsys.readouterr().out
    Path(recipe_file).write_text(shown)
    assert load(recipe_file).recipe.run.seed == 3
    assert "# ✓" in shown


@pytest.mark.parametrize(
    "change, where",
    [
        ({"run": {"name": "a/b"}}, "run.name"),
        ({"run": {"name": ".."}}, "run.name"),
        ({"trainer": {"steps": None}}, "trainer"),
        ({"trainer": {"steps": -1}}, "trainer.steps"),
        ({"trainer": {"microbatch": 0}}, "trainer.microbatch"),
        ({"trainer": {"max_time": "soon"}}, "trainer.max_time"),
        ({"trainer": {"devices": 3}}, "trainer.batch_tokens"),
        ({"trainer": {"devices": 2, "mesh": {"replicate": 3}}}, "trainer.mesh"),
        ({"trainer": {"non_finite": "rewind"}}, "checkpoint.every"),
        ({"trainer": {"spike": 1.0}}, "trainer.spike"),
        ({"trainer": {"clip": 0.0}}, "trainer.clip"),
        ({"data": {"seq_len": 1}}, "data.seq_len"),
        ({"data": {"seq_len": 1024}, "trainer": {"batch_tokens": 1024}}, "data.seq_len"),
        ({"data": {"train": []}}, "data.train"),
        ({"data": {"eval": []}}, "data.eval"),
        ({"data": {"near_dedup": 1.5}}, "data.near_dedup"),
        ({"evaluation": {"best": "bpb/elsewhere"}}, "evaluation.best"),
        ({"evaluation": {"stop": [{"metric": "bpb/held-out"}]}}, "evaluation.stop[0]"),
        ({"evaluation": {"stop": [{"metric": "bpb/held-out", "patience": 0}]}}, "evaluation.stop[0].patience"),
        ({"trainable": {"lora": {"rank": 0}}}, "trainable.lora.rank"),
        ({"trainable": {"include": []}}, "trainable.include"),
        ({"trainable": {"include": ["modle.*"]}}, "trainable.include"),
        ({"trainable": {"exclude": ["*.nothing"]}}, "trainable.exclude"),
        ({"trainable": {"include": ["*.norm.weight"], "lora": {"rank": 2}}}, "trainable"),
        ({"trainable": {"lora": {"rank": 2, "targets": ["q_prok"]}}}, "trainable.lora.targets"),
        ({"trainer": {"mesh": {"replicate": 2}}}, "trainer.mesh"),
        ({"trainer": {"mesh": {"shard": 4}}}, "trainer.mesh"),
        ({"trainer": {"precision": "bf16"}}, "trainer.precision"),
        ({"model": {"attention": "flex"}}, "model.attention"),
        ({"model": {"revision": "main"}}, "model.revision"),
        ({"model": {"rope_scaling": {"foo": 3}}}, "model.rope_scaling.foo"),
        ({"teacher": {"base": "self"}}, "teacher"),
        ({"optimizer": {"name": "adamw", "lr": float("inf")}}, "optimizer.lr"),
        ({"optimizer": {"name": "adamw", "eps": -1.0}}, "optimizer.eps"),
        ({"optimizer": {"name": "adamw", "weight_decay": float("inf")}}, "optimizer.weight_decay"),
        ({"schedule": {"name": "cosine", "warmup": float("nan")}}, "schedule.warmup"),
        ({"schedule": {"name": "constant", "warmup": float("inf")}}, "schedule.warmup"),
        ({"schedule": {"name": "wsd", "warmup": 7}}, "schedule.warmup"),
        ({"evaluation": {"stop": [{"metric": "bpb/held-out", "above": float("nan")}]}}, "evaluation.stop[0].above"),
        ({"evaluation": {"stop": [{"metric": "bbp/held-out", "below": 1.0}]}}, "evaluation.stop[0].metric"),
        ({"evaluation": {"best": "masked_ce/held-out/b4"}}, "evaluation.best"),
        ({"evaluation": {"suites": ["masked_ce", {"name": "masked_ce", "t": [0.5]}]}}, "evaluation.suites[1]"),
        ({"generation": {"prompts": ["the", ""]}}, "generation.prompts[1]"),
        ({"data": {"train": [{"source": "jsonl:nowhere.jsonl"}]}}, "data.train[0].source"),
        ({"data": {"eval": [{"source": {"name": "docstrings", "packages": ["no-such"]}}]}}, "data.eval[0].source"),
        ({"data": {"train": [{"source": "hub:org/out-of-reach"}]}}, "data.train[0].source"),
        ({"generation": {"samplers": []}}, "generation.samplers"),
        ({"optimizer_state": "keep"}, "optimizer_state"),
        ({"model": {"base": "nowhere/at-all", "conversions": ["mask_token"]}}, "model.base"),
    ],
)
def test_rules(change, where, tiny_base, tmp_path):
    from adapt.config import resolve
    from adapt.train.validate import problems

    recipe = tiny_recipe(tiny_base, tmp_path)
    assert problems(resolve(recipe)) == []
    for key, value in change.items():
        recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
    assert where in {p.where for p in problems(resolve(recipe))}


def test_a_wrong_key_hides_no_other_problem(recipe_file, capsys):
    """Sections that can be read are checked beside those that cannot, without guesses about the wrong keys."""
    argv = ["-c", recipe_file, "trainer.stepz=3", "data.seqlen=32", "objective.ar_weight=x"]
    argv += ["optimizer.lr=-1", "model.revision=main", "evaluation.best=bbp/held-out", "checkpoint.keep=0"]
    for verb in ("validate", "fit"):
        assert cli.main([verb, *argv]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        keys = sorted(line.split(":")[1].strip() for line in lines)
        wrong = ["data.seqlen", "objective.ar_weight", "trainer.stepz"]
        assert keys == sorted([*wrong, "checkpoint.keep", "evaluation.best", "model.revision", "optimizer.lr"])


def test_a_folder_without_weights_is_refused_beforehand(tiny_base, tmp_path):
    from adapt.config import resolve
    from adapt.train.validate import problems

    shutil.copytree(tiny_base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"")
    (found,) = problems(resolve(tiny_recipe(tmp_path / "base", tmp_path)))
    assert found.where == "model.base"
    assert "pytorch_model.bin: pickled weights" in found.what


def test_metrics_of_other_sizes_and_suites_are_known(tiny_base, tmp_path):
    from adapt.config import resolve
    from adapt.train.validate import problems

    suites = ["bpb", "masked_ce", {"name": "masked_ce", "block_size": 4}, "tokens_per_forward", "elbo"]
    suites[-1] = {"name": "elbo", "block_size": 4}
    for metric in ("masked_ce/held-out/b4/t0.5", "tokens_per_forward/tau0.9", "elbo_bpb/held-out/b4", "bpb/held-out"):
        recipe = tiny_recipe(tiny_base, tmp_path, evaluation={"suites": suites, "best": metric})
        assert problems(resolve(recipe)) == []


def test_problems_of_one_stage_name_it(tiny_base, tmp_path):
    from adapt.config import resolve
    from adapt.train.validate import problems

    stages = [{"name": "a"}, {"name": "b", "trainer": {"clip": -1.0}}]
    found = problems(resolve(tiny_recipe(tiny_base, tmp_path) | {"stages": stages}))
    assert [p.where for p in found] == ["stages[1] (b) trainer.clip"]


def test_offline_says_what_it_could_not_check(tiny_base, tmp_path, capsys):
    path = tmp_path / "far.yaml"
    recipe = tiny_recipe(tiny_base, tmp_path)
    recipe["model"] = {"base": "somewhere/far", "conversions": ["mask_token"]}
    recipe["data"]["train"].append({"source": "hub:org/far"})
    path.write_text(yaml.safe_dump(recipe))
    assert cli.main(["validate", "-c", str(path), "--offline"]) == 0
    shown = capsys.readouterr().out
    assert "# ? not checked: model.base" in shown
    assert "# ? not checked: data.train[1].source: data set org/far" in shown


def raising(error: BaseException):
    def run(_):
        raise error

    return ("", lambda parser: None, run)


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UserError("no such thing"), 2, "error: no such thing"),
        (StopRequested("stopped; checkpoint saved"), 75, "stopped; checkpoint saved"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (RuntimeError("we broke it"), 1, "Traceback"),
    ],
)
def test_exit_codes(error, code, said, monkeypatch, capsys):
    monkeypatch.setitem(cli.VERBS, "x", raising(error))
    assert cli.main(["x"]) == code
    assert said in capsys.readouterr().err


def test_a_closed_pipe_is_quiet():
    code = "import sys; from adapt.cli import main; sys.exit(main(['recipes']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == ""


def test_users_cannot_steer_the_terminal(capsys):
    assert printable("a\x1b[31mb\r\u202ec\td\n") == "a\\x1b[31mb\\x0d\\u202ec\td\n"
    assert cli.main(["fit", "-c", "x\x1b]0;owned\x07"]) == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert "\x07" not in err


def test_problems_wrap_on_a_terminal_only():
    from rich.console import Console

    long = Problem("data.train[0].source", "word " * 60)
    wide, narrow = io.StringIO(), io.StringIO()
    print_problems([long, long], Console(file=wide, width=40))
    print_problems([long], Console(file=narrow, width=40, force_terminal=True))
    assert len(wide.getvalue().splitlines()) == 2
    assert "[0]" in wide.getvalue()
    lines = narrow.getvalue().splitlines()
    assert len(lines) > 5
    assert all(line.startswith("  ") for line in lines[1:])


def test_recipes_are_listed_with_their_first_comment(capsys):
    assert cli.main(["recipes"]) == 0
    assert any(
        line.startswith("nbdiff ") and "block-diffusion" in line for line in capsys.readouterr().out.splitlines()
    )


@pytest.mark.parametrize(
    "key, value",
    [
        ("trainer.precision", "bf16"),
        ("trainer.compile", True),
        ("trainer.activation_checkpointing", True),
        ("trainer.mesh", {"replicate": 2}),
        ("trainer.devices", 2),
        ("trainable.lora", {"rank": 4}),
    ],
)
def test_what_is_built_once_cannot_change_between_stages(key, value, tiny_base, tmp_path):
    """The model is sharded, compiled and given adapters before the first stage; a stage's own wish would be ignored."""
    from adapt.config import resolve
    from adapt.train.validate import check

    section, name = key.split(".")
    stages = [{"name": "a"}, {"name": "b", section: {name: value}}]
    found = check(resolve(tiny_recipe(tiny_base, tmp_path) | {"stages": stages})).problems
    assert f"stages[1].{key}" in [p.where for p in found]
