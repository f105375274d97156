"""`adapt data clean`: the same steps on datatrove, here and as a SLURM batch script."""

from __future__ import annotations

import argparse
import gzip
import json
import re

import pytest

from adapt.config.load import resolve
from adapt.data import clean_verb
from adapt.data.prepare import open_sources
from adapt.errors import UserError
from tests.data.helpers import write_jsonl
from tests.recipes import tiny_recipe

pytest.importorskip("datatrove")
STEPS = ["tests.data.steps.strip", {"name": "tests.data.steps.min_words", "words": 3}, "tests.data.steps.seen_lines"]
CHAT = [{"role": "user", "content": "<b>Hi there"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def resolved(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(3):
        records = [{"text": f"<b>page {i} {k} of the book", "stars": k} for k in range(4)]
        write_jsonl(texts / f"{i}.jsonl", [*records, {"text": "too short"[: i + 3]}, {"messages": CHAT}])
    data = {"train": [{"source": f"jsonl:{texts}", "name": "book", "clean": STEPS}], "eval": []}
    return resolve(tiny_recipe(tmp_path / "no-model", tmp_path, data=data))


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    clean_verb.add_arguments(parser)
    return parser.parse_args(list(given))


def read(folder) -> list[dict]:
    return [json.loads(line) for f in sorted(folder.glob("*.jsonl.gz")) for line in gzip.open(f, "rt")]


@pytest.mark.parametrize("tasks", [1, 2, 5])  # one reads all; by file; by document
def test_the_same_steps_here(resolved, tmp_path, capsys, tasks):
    to = tmp_path / f"clean-{tasks}"
    assert clean_verb.clean(resolved, arguments("--to", str(to), "--tasks", str(tasks), "--workers", "1")) == 0
    records = read(to / "book")
    assert sorted(r["text"] for r in records if "text" in r) == [
        f"page {i} {k} of the book" for i in range(3) for k in range(4)
    ]
    assert {r["stars"] for r in records if "text" in r} == {0, 1, 2, 3}
    chats = [r["messages"] for r in records if "messages" in r]
    assert chats == [[{"role": "user", "content": "Hi there"}, CHAT[1]]] * 3
    out = capsys.readouterr().out
    assert "book: not run here, because they look at all documents in order: tests.data.steps.seen_lines" in out
    stats = json.loads((to / "logs" / "book" / "stats.json").read_text())
    (dropped,) = [n for s in stats for why, n in s["stats"].items() if why == "dropped: fewer than 3 words"]
    assert (dropped if isinstance(dropped, int) else dropped["total"]) == 3
    data = tiny_recipe(tmp_path, tmp_path, data={"train": [{"source": f"path:{to / 'book'}"}], "eval": []})
    ((_, _, source),) = open_sources(resolve(data).recipe.data)[1]
    assert len(list(source.documents())) == 15


def test_a_folder_of_other_steps_is_refused(resolved, tmp_path):
    to = tmp_path / "clean"
    clean_verb.clean(resolved, arguments("--to", str(to)))
    clean_verb.clean(resolved, arguments("--to", str(to)))  # finished: nothing to do
    plain = resolved.plain
    plain["data"]["train"][0]["clean"] = STEPS[:1]
    with pytest.raises(UserError, match=r"book.json: the folder has texts of another source or of other steps"):
        clean_verb.clean(resolve(plain), arguments("--to", str(to)))


def test_the_batch_script(resolved, tmp_path, monkeypatch):
    from datatrove.executor import slurm

    submitted = []
    monkeypatch.setattr(
        slurm, "launch_slurm_job", lambda script, retriever, *given: submitted.append((script, given)) or "7"
    )
    to = tmp_path / "clean"
    given = ("--executor", "slurm", "--partition", "cpu", "--time", "01:00:00", "--tasks", "40", "--workers", "8",
             "--mem-per-cpu", "4", "--depends", "123", "--sbatch", "account=lab")  # fmt: skip
    assert clean_verb.clean(resolved, arguments("--to", str(to), *given)) == 0
    (script, options), (merge, _) = submitted
    lines = dict(re.findall(r"#SBATCH --([\w-]+)=?(.*)", script))
    expected = {"partition": "cpu", "time": "01:00:00", "array": "0-39%8", "cpus-per-task": "1", "mem-per-cpu": "4G",
                "job-name": "clean-book", "account": "lab", "requeue": ""}  # fmt: skip
    assert {k: lines[k] for k in expected} == expected
    assert "--dependency=afterok:123" in options
    assert f"launch_pickled_pipeline {to}/logs/book/executor.pik" in script
    assert (to / "logs" / "book" / "executor.pik").is_file()
    assert "merge_stats" in merge


def test_what_is_missing_is_said_at_once(resolved, tmp_path, monkeypatch):
    with pytest.raises(UserError) as caught:
        clean_verb.clean(resolved, arguments("--executor", "slurm", "--tasks", "0", "--sbatch", "x"))
    assert [p.where for p in caught.value.problems] == ["--to", "--tasks", "--partition", "--time", "--sbatch"]
    monkeypatch.setattr(clean_verb, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs datatrove: pip install 'adapt-lm\[scale\]'"):
        clean_verb.clean(resolved, arguments("--to", str(tmp_path)))


def test_its_options_are_refused_elsewhere(capsys):
    from adapt.cli import main

    assert main(["data", "stats", "-c", "nbdiff", "--to", "x", "--tasks", "3"]) == 2
    told = capsys.readouterr().err
    assert "--to: is for `adapt data clean`; stats has no such option" in told
    assert "--tasks" in told
