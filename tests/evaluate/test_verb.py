"""`adapt evaluate` on a tiny model folder and on a run folder."""

from __future__ import annotations

import argparse
import json

import pytest

from adapt.errors import UserError
from adapt.evaluate import verb
from tests import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """model/ as an export leaves it, recipe.yaml, and run/ made of both."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = tiny.save_tiny(folder / "model", "qwen2")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"block_size": 4, "mask_token_id": 3}))
    (folder / "train.txt").write_text("Something else entirely, and enough of it to be a document. " * 20)
    (folder / "held-out.txt").write_text(tiny.TEXT * 6)
    recipe = {
        "run": {"name": "x"},
        "model": {"base": str(model)},
        "data": {
            "seq_len": 64,
            "train": [{"source": {"name": "text", "path": str(folder / "train.txt")}}],
            "eval": [{"name": "held-out", "source": {"name": "text", "path": str(folder / "held-out.txt")}}],
        },
        "objective": "next_token",
        "optimizer": "adamw",
        "schedule": "constant",
        "trainer": {"steps": 1},
        "evaluation": {"suites": [{"name": "masked_ce", "t": [0.5]}], "limit": 3},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(json.dumps(recipe))
    (folder / "run" / "export").symlink_to(model)
    return folder


def run(*argv) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.evaluate(parser.parse_args([str(a) for a in argv]))


def test_model_folder_with_a_recipe(place, capsys):
    suites = "bpb,masked_ce,tokens_per_forward"
    assert run(place / "model", "-c", place / "recipe.yaml", "--suite", suites, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert {"bpb/held-out", "masked_ce/held-out/b4/t0.5", "masked_ce/held-out/b4", "tokens_per_forward/tau0.9"} <= set(
        results
    )
    assert "masked_ce/held-out/b4/t1" not in results  # the recipe's own settings of a suite count


def test_run_folder_brings_everything(place, capsys):
    assert run(place / "run") == 0
    table = capsys.readouterr().out
    assert "masked_ce/held-out/b4/t0.5" in table
    assert "bpb" not in table
    run(place / "run", "--json")
    three = json.loads(capsys.readouterr().out)
    run(place / "run", "--json", "--limit", "1")
    assert json.loads(capsys.readouterr().out) != three


@pytest.mark.parametrize(
    ("argv", "letter"),
    (
        ([], "say which data"),
        (["-c", "RECIPE", "--suite", "bbp"], "Did you mean 'bpb'"),
        (["-c", "RECIPE", "--limit", "0"], "--limit"),
    ),
)
def test_bad_input(place, argv, letter):
    argv = [place / "recipe.yaml" if a == "RECIPE" else a for a in argv]
    with pytest.raises(UserError, match=letter):
        run(place / "model", *argv)


def test_recipe_without_held_out_data(place, tmp_path):
    recipe = json.loads((place / "recipe.yaml").read_text())
    recipe["data"]["eval"] = []
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    with pytest.raises(UserError, match="no held-out data"):
        run(place / "model", "-c", tmp_path / "r.yaml")


def test_every_configured_entry_of_a_suite_is_measured(place, tmp_path, capsys):
    recipe = json.loads((place / "recipe.yaml").read_text())
    recipe["evaluation"]["suites"] = [{"name": "masked_ce", "block_size": b, "t": [0.5]} for b in (2, 4)]
    (tmp_path / "two.yaml").write_text(json.dumps(recipe))
    for more in ([], ["--suite", "masked_ce"]):
        assert run(place / "model", "-c", tmp_path / "two.yaml", "--json", *more) == 0
        assert {"masked_ce/held-out/b2", "masked_ce/held-out/b4"} <= set(json.loads(capsys.readouterr().out))


def test_measuring_opens_no_training_data(place, tmp_path, capsys):
    recipe = json.loads((place / "recipe.yaml").read_text())
    recipe["data"]["train"] = [{"source": "jsonl:gone.jsonl"}]
    (tmp_path / "eval.yaml").write_text(json.dumps(recipe))
    assert run(place / "model", "-c", tmp_path / "eval.yaml", "--suite", "bpb", "--json") == 0
    assert "bpb/held-out" in capsys.readouterr().out
