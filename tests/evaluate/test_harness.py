"""`--lm-eval` with tasks of one's own: YAML and JSONL files, no network."""

from __future__ import annotations

import json
from fnmatch import fnmatch

import pytest
import torch

from adapt.errors import UserError
from adapt.evaluate import harness
from tests import tiny
from tests.evaluate.test_verb import place, run  # noqa: F401

QUESTIONS = [
    {"q": "The dog is", "choices": ["lazy", "a very quick fox"], "gold": 0},
    {"q": "Documents are", "choices": ["nothing", "packed"], "gold": 1},
    {"q": "Blocks grow from", "choices": ["one", "ten"], "gold": 0},
]
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{q}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1}
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "tiny.yaml").write_text(TASK.replace("FILE", str(folder / "q.jsonl")))
    return folder


def test_a_local_task_on_a_plain_model_is_what_brute_force_gives(place, tasks, capsys):  # noqa: F811
    assert run(place / "model", "--lm-eval", "tiny_choice", "--lm-eval-include", tasks, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    from adapt.generation.load import open_model

    opened = open_model(str(place / "model"))
    right = 0
    for record in QUESTIONS:
        given = opened.tokenizer(record["q"])["input_ids"]
        nats = []
        for choice in record["choices"]:
            ids = opened.tokenizer(f"{record['q']} {choice}")["input_ids"]
            with torch.no_grad():
                logp = opened.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            nats.append(-sum(float(logp[i - 1, ids[i]]) for i in range(len(given), len(ids))))
        right += nats.index(min(nats)) == record["gold"]
    assert results["lm_eval/tiny_choice/acc"] == pytest.approx(right / 3)
    assert set(results) == {f"lm_eval/tiny_choice/{m}{s}" for m in ("acc", "acc_norm") for s in ("", "_stderr")}


def test_suites_run_only_if_asked_for(place, tasks, capsys):  # noqa: F811
    argv = [
        "-c",
        place / "recipe.yaml",
        "--lm-eval",
        "tiny_choice",
        "--lm-eval-include",
        tasks,
        "--json",
        "--limit",
        "2",
    ]
    assert run(place / "model", *argv) == 0
    assert all(k.startswith("lm_eval/") for k in json.loads(capsys.readouterr().out))
    assert run(place / "model", *argv, "--suite", "bpb") == 0
    assert {"bpb/held-out", "lm_eval/tiny_choice/acc"} <= set(json.loads(capsys.readouterr().out))


class FewTasks:
    """The harness's index without its thousands of files."""

    all_tasks = all_subtasks = ("arc_challenge", "arc_easy", "hellaswag")

    def match_tasks(self, names):
        return [task for task in self.all_tasks for name in names if fnmatch(task, name)]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(harness, "index_of", lambda include, defaults: FewTasks())


def test_patterns_and_repetitions(few):
    assert harness.task_manager(["arc_*", "arc_easy", "hellaswag"], None)[1] == [
        "arc_challenge",
        "arc_easy",
        "hellaswag",
    ]


@pytest.mark.slow
def test_the_index_of_the_harness_itself():
    with pytest.raises(UserError, match=r"Did you mean 'arc_easy'.*It knows \d+,\d+"):
        harness.task_manager(["arc_eazy"], None)


@pytest.mark.parametrize(
    ("argv", "letter"),
    (
        (["--lm-eval", "arc_eazy"], "Did you mean 'arc_easy'"),
        (["--lm-eval", "tiny_choice"], "no task 'tiny_choice'"),
        (["--lm-eval", ","], "names no task"),
        (["--lm-eval", "arc_easy", "--lm-eval-include", "gone"], "no such folder"),
        (["--lm-eval-include", "gone", "--suite", "passkey"], "--lm-eval TASKS"),
    ),
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(place, few, argv, letter):  # noqa: F811
    with pytest.raises(UserError, match=letter):
        run(place / "no-model", *argv)


def test_without_the_library_the_extra_is_named(place, monkeypatch):  # noqa: F811
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'adapt-lm\[eval\]'"):
        run(place / "model", "--lm-eval", "arc_easy")


def test_a_context_that_is_not_causal_is_refused(tasks):
    manager, names = harness.task_manager(["tiny_choice"], str(tasks))
    model = tiny.tiny_model()
    model.config.context_mask = "block"
    with pytest.raises(UserError, match="context_mask: block"):
        harness.measure(model, tiny.tiny_tokenizer(), manager, names, None, 0)


def test_data_that_cannot_be_had(tasks):
    (tasks / "tiny.yaml").write_text(TASK.replace("FILE", str(tasks / "gone.jsonl")))
    manager, names = harness.task_manager(["tiny_choice"], str(tasks))
    with pytest.raises(UserError, match="cannot be loaded"):
        harness.measure(tiny.tiny_model(), tiny.tiny_tokenizer(), manager, names, None, 0)
