"""Every shipped recipe as a tiny twin: its own objective, evaluation and decoding on a tiny model, to the end."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from adapt.config import load, resolve, shipped_recipes
from adapt.config.decode import encode
from adapt.objectives.base import Facts
from adapt.tokenization.vocabulary import Vocabulary
from adapt.train.arms import fit_arms
from adapt.train.fit import fit
from adapt.train.validate import check
from tests import tiny
from tests.recipes import corpus, preferences, tiny_recipe
from tests.train.test_arms import here

CONTRACT = ("block_size", "prediction", "noisy_attention", "block_first")
"""Keys of an objective that decoding reads from the export."""
SHORT = 8
"""Tokens of a block, a prompt, an answer."""
GOLDEN = Path(__file__).parent / "golden_losses.json"
"""Losses of the twins' first steps. A change that is meant to move them records them again: ADAPT_GOLDEN=record."""
GOLDEN_STEPS = 20
PASSKEY = 288
"""Tokens of a passkey text in the tiny vocabulary."""


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_validate(name, tmp_path):
    """All problems would be named; what is out of reach is listed as not checked."""
    report = check(load(name, [f"run.dir={tmp_path}"]), offline=True)
    assert not report.problems, report.problems


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if not n.startswith("paper/")])
def test_tiny_twin_trains_evaluates_and_exports(name, tiny_base, tmp_path):
    resolved = load(name)
    shipped = encode(resolved.recipe)
    recipe = tiny_recipe(tiny_base, tmp_path)
    pairs = resolved.recipe.objective.declares("pairs")
    recipe["data"] |= {part: sources(shipped["data"][part], tmp_path, part, pairs) for part in ("train", "eval")}
    if pairs:  # a worked answer and its problem take a row, in the letters of the tiny tokenizer
        recipe["data"]["seq_len"], recipe["trainer"]["batch_tokens"] = 512, 1024
    if "passkey" in (d["source"]["name"] for d in recipe["data"]["train"]):  # in one row with its question
        recipe["data"]["seq_len"], recipe["trainer"]["batch_tokens"] = PASSKEY, 4 * PASSKEY
    recipe["objective"] = shrunk(shipped["objective"])
    suites = [short(s, tmp_path) for s in shipped["evaluation"]["suites"]]
    recipe["evaluation"] = {"suites": suites, "limit": 4, "every": 10}
    recipe["teacher"] = shipped["teacher"]
    recipe["export"] |= {"interpolation": shipped["export"]["interpolation"]}
    recipe["generation"] |= {"samplers": shipped["generation"]["samplers"]}
    recipe["model"]["conversions"] += mixers(shipped["model"]["conversions"])
    stages = resolved.plain.get("stages") or []
    steps = -(-GOLDEN_STEPS // max(1, len(stages)))
    recipe["stages"] = [shortened(stage, steps, recipe["data"]["seq_len"]) for stage in stages]
    recipe["trainable"] = {key: shipped["trainable"][key] for key in ("include", "exclude", "lora")}
    recipe["trainable"]["include"] = [
        re.sub(r"layers\.2.*?\.\*", "layers.1.*", p) for p in recipe["trainable"]["include"]
    ]
    recipe["trainer"]["steps"] = steps
    assert fit(resolve(recipe)) == 0
    run = tmp_path / "runs" / "tiny"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    same_as_recorded(name, [line["loss"] for line in lines if line.get("loss") is not None][:GOLDEN_STEPS])
    trained = json.loads((run / "data.json").read_text())["train"]
    assert [entry["label"] for entry in trained] == [d["name"] for d in recipe["data"]["train"]]
    config = json.loads((run / "export" / "config.json").read_text())
    stated = {key: recipe["objective"].get(key) for key in CONTRACT}
    assert {key: config.get(key) for key in CONTRACT} == stated
    vocabulary = Vocabulary.of(tiny.tiny_tokenizer(), tiny.tiny_config())
    facts = Facts(mask_token_id=config["mask_token_id"], vocabulary=vocabulary)
    promised = resolve(recipe).recipe.objective.build(facts).export_fields()
    assert config.items() >= {k: v for k, v in promised.items() if k != "threshold"}.items()


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if load(n).arms])
def test_tiny_twins_of_all_arms_train_and_are_compared(name, tiny_base, tmp_path):
    """Each arm with what it says about its optimizer, its objective and its length."""
    shipped, recipe = load(name), tiny_recipe(tiny_base, tmp_path, objective="next_token", trainer={"steps": 3})
    recipe |= {"generation": {}, "evaluation": {"suites": ["bpb"], "limit": 2}}
    stated = shipped.plain["arms"]
    recipe["arms"] = {
        arm: {key: encode(getattr(resolved.recipe, key)) for key in stated[arm] if key not in ("trainer", "model")}
        for arm, resolved in shipped.arms.items()
    }
    first = next(iter(shipped.arms.values())).recipe
    recipe |= {key: encode(getattr(first, key)) for key in ("optimizer", "optimizer_schedules")}
    for over in (recipe, *recipe["arms"].values()):
        for wanted in over.get("optimizer_schedules", {}).values():
            wanted["schedule"] = "linear"
    assert fit_arms(resolve(recipe), start=here) == 0
    folder = tmp_path / "runs" / "tiny"
    assert (folder / "comparison.html").is_file()
    for arm, resolved in shipped.arms.items():
        lines = [json.loads(line) for line in (folder / arm / "metrics.jsonl").read_text().splitlines()]
        assert [line["loss"] for line in lines if line.get("loss") is not None]
        assert set(resolved.recipe.optimizer_schedules) <= {key for line in lines for key in line}
        assert (folder / arm / "export" / "config.json").is_file()


def same_as_recorded(name: str, losses: list[float]) -> None:
    """Golden losses: what a recipe trains has changed where they differ by more than rounding."""
    recorded = json.loads(GOLDEN.read_text())
    if os.environ.get("ADAPT_GOLDEN") == "record":
        recorded[name] = [float(f"{loss:.7g}") for loss in losses]
        GOLDEN.write_text(json.dumps(dict(sorted(recorded.items())), indent=1) + "\n")
        return
    assert name in recorded, f"no losses are recorded for {name}: ADAPT_GOLDEN=record pytest {__file__} -k twin"
    assert losses == pytest.approx(recorded[name], rel=1e-4)


def shortened(stage: dict, steps: int, length: int) -> dict:
    """Longer rows where the stage has longer ones."""
    if "seq_len" not in stage.get("data", {}):
        return stage | {"trainer": {"steps": steps}}
    longer = min(2 * length, 512)  # the tiny model's positions
    return stage | {"data": {"seq_len": longer}, "trainer": {"steps": steps, "batch_tokens": 2 * longer}}


def mixers(shipped: list[dict]) -> list[dict]:
    """Conversions of layers as they are, on two of them; ranks become shares, which a tiny head has, too."""
    found = [c | ({"keep": "every_2"} if c.get("keep", "none") != "none" else {}) for c in shipped if "layers" in c]
    found = [
        c | ({"layers": [i for i in c["layers"] if i < 2]} if isinstance(c["layers"], list) else {}) for c in found
    ]
    sizes = dict.fromkeys(("kv_rank", "q_rank", "rope_dim", "nope_dim", "kv_budget", "kv_energy")) | {"kv_cache": 0.5}
    return [c | (sizes if "kv_rank" in c else {}) for c in found]


def sources(shipped: list[dict], folder, part: str, pairs: bool = False) -> list[dict]:
    """As many, with the same names and weights, each a few made-up documents of its own: preference pairs, where these
    are learned from, but for guards."""
    found = []
    for i, dataset in enumerate(shipped):
        made = preferences if pairs and not dataset["guard"] else corpus
        path = made(folder, 40, seed=i) if part == "train" else made(folder, 12, seed=100 + i)
        label = dataset["name"] or f"{part}-{i}"
        kept = {key: dataset[key] for key in ("weight", "replay", "guard")}
        found.append({"source": source_of(dataset["source"], path), "name": label} | kept)
    return found


def source_of(shipped: dict, path) -> dict:
    """Made-up text in the place of text; prompts and answers stay what they are."""
    made = shipped["name"] in ("arithmetic", "passkey")
    short = {"length": PASSKEY} if "length" in shipped else {}
    return shipped | short | {"count": 30} if made else {"name": "jsonl", "path": str(path)}


def short(suite: dict, folder) -> dict:
    suite = suite | {k: SHORT for k in ("prompt_tokens", "new_tokens", "max_new_tokens") if k in suite}
    suite |= {"lengths": [480], "depths": 1, "trials": 1} if "lengths" in suite else {}
    suite |= {"length": 128} if "length" in suite else {}
    if "source" in suite:
        path = folder / "questions.jsonl"
        asked = {"prompt": "what does the model read?", "response": "7 pages", "distractors": ["words", "noisy text"]}
        path.write_text(json.dumps(asked))
        suite |= {"source": {"name": "jsonl", "path": str(path)}, "limit": 2}
    return suite


def shrunk(objective: dict) -> dict:
    """Blocks of at most 8, grown within three steps; what other objectives say stays as it is."""
    if objective.get("block_size"):
        objective["block_size"] = min(objective["block_size"], SHORT)
    growth = objective.get("growth")
    if growth and growth["name"] == "geometric":
        growth |= {"every": 1}
    elif growth:
        growth |= {"steps": list(range(len(growth["sizes"])))}
    return objective
