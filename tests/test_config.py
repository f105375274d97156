"""A recipe says what it means: typed, complete, with every problem at once, and the same again after printing."""

from __future__ import annotations

import pytest
import yaml

from adapt.config import load, resolve, shipped_recipes
from adapt.config.text import read_yaml, write_yaml
from adapt.errors import RecipeError, UserError
from tests.recipes import tiny_recipe


@pytest.fixture
def plain(tmp_path):
    return tiny_recipe(tmp_path / "base", tmp_path)


@pytest.fixture
def recipe_file(plain, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def problems(error) -> dict[str, str]:
    return {p.where: p.what for p in error.value.problems}


def test_unknown_key_names_the_nearest(recipe_file):
    with pytest.raises(UserError) as error:
        load(str(recipe_file), ["data.seqlen=64"])
    assert "Did you mean 'seq_len'?" in problems(error)["data.seqlen"]


def test_all_problems_at_once_with_their_keys(plain):
    plain["data"]["seq_len"] = "long"
    plain["trainer"]["stepz"] = 3
    plain["optimizer"]["lr"] = [1]
    plain["objective"]["growth"]["start"] = 2.5
    del plain["model"]["base"]
    plain["evaluation"]["suites"][0] = "bpbb"
    with pytest.raises(UserError) as error:
        resolve(plain)
    found = problems(error)
    assert found["data.seq_len"] == "expected a whole number, got 'long'"
    assert "there is no such key" in found["trainer.stepz"]
    assert "expected a number" in found["optimizer.lr"]
    assert found["model.base"] == "is required and missing"
    assert "Did you mean 'bpb'?" in found["evaluation.suites[0]"]
    assert any(key.startswith("objective.growth") for key in found)
    assert len(found) == 6


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("run.seed", True, "whole number"),
        ("data.exact_dedup", 1, "true or false"),
        ("run.name", 7, "expected text"),
        ("export.dtype", "float33", "Did you mean 'float32'?"),
        ("trainer.microbatch", "atuo", "a whole number or 'auto'"),
        ("data.train", {"source": "x"}, "expected a list"),
        ("trainer", 3, "expected a section with keys"),
        ("objective", 3, "expected a objective name"),
        ("data.seq_len", None, "whole number"),
    ],
)
def test_wrong_types(recipe_file, key, value, expected):
    with pytest.raises(UserError) as error:
        load(str(recipe_file), [f"{key}={write_yaml(value) if isinstance(value, dict) else read_back(value)}"])
    assert expected in problems(error)[key]


def read_back(value) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def test_whole_numbers_are_fine_where_numbers_are_asked(recipe_file):
    assert load(str(recipe_file), ["optimizer.lr=1"]).recipe.optimizer.config.lr == 1.0


def test_interpolation_follows_overrides(recipe_file):
    resolved = load(str(recipe_file), ["trainer.batch_tokens=${data.seq_len}", "data.seq_len=128"])
    assert resolved.recipe.trainer.batch_tokens == 128


def test_interpolation_sees_the_stage(plain):
    plain["trainer"]["batch_tokens"] = "${data.seq_len}"
    plain["stages"] = [{"name": "short"}, {"name": "long", "data": {"seq_len": 128}}]
    assert [r.trainer.batch_tokens for r in resolve(plain).stages] == [64, 128]


def test_broken_interpolation_is_a_problem(recipe_file):
    with pytest.raises(UserError, match="nowhere"):
        load(str(recipe_file), ["run.name=${nowhere.to.be}"])


def test_extends_merges_and_lists_replace(recipe_file, tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text("extends: recipe.yaml\nrun: {name: child}\nevaluation: {suites: [bpb]}\n")
    recipe = load(str(child)).recipe
    assert (recipe.run.name, recipe.run.seed, len(recipe.evaluation.suites)) == ("child", 7, 1)


def test_extends_in_a_circle(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(UserError, match="circle"):
        load(str(tmp_path / "a.yaml"))


def test_a_component_is_replaced_when_its_name_changes_and_merged_otherwise(recipe_file):
    same = load(str(recipe_file), ["objective.ar_weight=0.25"]).recipe.objective.config
    assert (same.block_size, same.ar_weight) == (8, 0.25)
    assert load(str(recipe_file), ["objective.name=next_token"]).recipe.objective.name == "next_token"
    assert load(str(recipe_file), ["objective=next_token"]).recipe.objective.name == "next_token"
    both = load(str(recipe_file), ["schedule.final=0.5", "schedule.name=cosine"]).recipe.schedule.config
    assert (both.final, both.warmup) == (0.5, 0.34)
    other = load(str(recipe_file), ["schedule.warmup=3", "schedule.name=constant"]).recipe.schedule
    assert (other.name, other.config.warmup) == ("constant", 3)  # the field is the new component's


def test_a_label_is_not_a_component_name(recipe_file):
    dataset = load(str(recipe_file), ["data.eval.0.name=other"]).recipe.data.eval[0]
    assert (dataset.name, dataset.source.name) == ("other", "jsonl")


def test_bare_and_short_forms(recipe_file, tmp_path):
    recipe = load(str(recipe_file), ["optimizer=adamw", f'data.eval=[{{source: "jsonl:{tmp_path}/x.jsonl"}}]']).recipe
    assert recipe.optimizer.config == type(recipe.optimizer.config)()  # a bare name means its defaults
    assert recipe.data.eval[0].source.config.path == f"{tmp_path}/x.jsonl"
    longer = load(str(recipe_file), ["optimizer=adamw", "optimizer.lr=0.5"]).recipe.optimizer
    assert (longer.name, longer.config.lr) == ("adamw", 0.5)
    with pytest.raises(UserError, match="jsonl"):
        load(str(recipe_file), ['data.eval=[{source: "jsnl:x"}]'])


def test_list_elements_by_index(recipe_file):
    assert load(str(recipe_file), ["data.train.0.weight=2"]).recipe.data.train[0].weight == 2
    assert load(str(recipe_file), ["data.train[0].weight=3"]).recipe.data.train[0].weight == 3
    more = load(str(recipe_file), ["data.train.1={source: 'jsonl:more.jsonl', weight: 4}"]).recipe.data.train
    assert [d.weight for d in more] == [1, 4]
    with pytest.raises(UserError, match="1 entries"):
        load(str(recipe_file), ["data.train.5.weight=2"])


def test_stages_merge_and_print_exactly(plain, tmp_path):
    plain["objective"]["ar_weight_end"] = 0.01
    plain["stages"] = [
        {"name": "ar", "objective": "next_token", "trainer": {"steps": 2}},
        {"name": "blocks", "optimizer": {"lr": 5e-4}, "optimizer_state": "keep"},
    ]
    resolved = resolve(plain)
    first, second = resolved.stages
    assert (first.objective.name, first.trainer.steps, first.trainer.batch_tokens) == ("next_token", 2, 256)
    assert (second.objective.config.ar_weight_end, second.trainer.steps, second.optimizer.config.lr) == (0.01, 6, 5e-4)
    path = tmp_path / "printed.yaml"
    path.write_text(resolved.to_yaml())
    again = load(str(path))
    assert (again.stages, again.names) == (resolved.stages, resolved.names)
    assert again.to_yaml() == resolved.to_yaml()


def test_stage_problems_name_the_stage(plain):
    plain["stages"] = [{"name": "a"}, {"name": "b", "run": {"name": "x"}, "trainer": {"stepz": 1}}]
    with pytest.raises(UserError) as error:
        resolve(plain)
    assert {"stages[1].run", "stages[1].trainer.stepz"} == set(problems(error))


def test_an_override_that_a_stage_would_hide_is_refused(plain, tmp_path):
    plain["stages"] = [{"name": "a", "trainer": {"steps": 2}}]
    path = tmp_path / "staged.yaml"
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(UserError, match=r"stages\.0\.trainer\.steps"):
        load(str(path), ["trainer.steps=1"])
    assert load(str(path), ["stages.0.trainer.steps=1"]).recipe.trainer.steps == 1


def test_yaml_round_trip(recipe_file, tmp_path):
    text = "line one\nnull: ${x} \\${y} é 1e5\x1b"
    first = load(str(recipe_file), ["run.name='1e5'", "trainer.max_time=10:00:00", "optimizer.lr=2e-5"])
    assert (first.recipe.run.name, first.recipe.trainer.max_time) == ("1e5", "10:00:00")
    plain = read_yaml(first.to_yaml())
    plain["generation"]["prompts"] = [text.replace("\\${y}", "").replace("${x}", "\\${x}")]
    first = resolve(plain)
    assert "${x}" in first.recipe.generation.prompts[0]
    path = tmp_path / "again.yaml"
    path.write_text(first.to_yaml())
    again = load(str(path))
    assert again.stages == first.stages
    assert again.to_yaml() == first.to_yaml()


@pytest.mark.parametrize(
    "text, value",
    [
        ("2e-5", 2e-5),
        ("10:00:00", "10:00:00"),
        ("010", "010"),
        ("2026-01-01", "2026-01-01"),
        ("1_000", 1000),
        (".5", 0.5),
        ("-3", -3),
        ("1.0", 1.0),
        ("null", None),
        ("true", True),
        (".inf", float("inf")),
    ],
)
def test_scalars_as_people_mean_them(text, value):
    assert read_yaml(text) == value
    assert read_yaml(write_yaml({"x": value})) == {"x": value}
    assert read_yaml(write_yaml({"x": text})) == {"x": text}


@pytest.mark.parametrize(
    "text, message",
    [
        ("run: {name: x", "not valid YAML"),
        ("- a\n- b", "mapping of sections"),
        ("", "mapping of sections"),
        ("run: {name: a}\nrun: {name: b}", "given twice"),
        ("run: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("extends: 7", "extends"),
        ("extends: nowhere.yaml", "nowhere"),
        ("stages: 3", "list of sections"),
        ("\ufffe\x00", "not valid YAML"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load(str(path))


@pytest.mark.parametrize(
    "item", ["trainer.steps", "=3", "trainer..steps=3", "trainer.steps=[1", "trainer.steps=a: b: c"]
)
def test_malformed_overrides(recipe_file, item):
    with pytest.raises(UserError, match="override"):
        load(str(recipe_file), [item])


def test_keys_of_recipe_files_are_known(plain, tmp_path):
    plain["stage"] = [{"name": "a"}]
    with pytest.raises(UserError) as error:
        resolve(plain)
    assert "Did you mean 'stages'?" in problems(error)["stage"]


def test_a_parent_that_is_not_there_is_named_with_its_child(tmp_path):
    (tmp_path / "middle.yaml").write_text("extends: nope\n")
    (tmp_path / "child.yaml").write_text("extends: middle.yaml\n")
    with pytest.raises(UserError, match=r"middle.yaml: extends: there is no recipe file 'nope'"):
        load(str(tmp_path / "child.yaml"))


def test_what_can_be_read_of_a_broken_recipe(plain):
    plain["trainer"]["stepz"] = 3
    plain["evaluation"]["suites"] = ["bpb", "bpbb", "masked_ce"]
    plain["stages"] = [{"name": "a"}, {"name": "b", "optimizer": {"lr": "much"}}]
    with pytest.raises(RecipeError) as error:
        resolve(plain)
    assert set(problems(error)) == {"trainer.stepz", "evaluation.suites[1]", "stages[1].optimizer.lr"}
    first, second = error.value.readable.stages
    assert [s.name for s in first.evaluation.suites] == ["bpb", "masked_ce"]
    assert (first.optimizer.config.lr, first.trainer.steps) == (1e-3, 6)
    assert second.optimizer.config.lr == 1e-5  # its default
    del plain["model"]["base"]
    with pytest.raises(RecipeError) as error:
        resolve(plain)
    assert error.value.readable is None


def test_an_unknown_recipe_lists_the_shipped(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'nbdiff'"):
        load("nbdif")


def test_components_by_dotted_path(recipe_file):
    assert load(str(recipe_file), ["schedule=adapt.optim.schedules.cosine.cosine"]).recipe.schedule.config.warmup >= 0
    for path in ("adapt.optim.nowhere.at_all", "os.path.join", ".x", "x..y"):
        with pytest.raises(UserError, match="schedule"):
            load(str(recipe_file), [f"schedule={path}"])


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads(name):
    assert load(name).stages
