"""Preparation as an engine: the same bytes for any number of workers and after any interruption; numbers that add up."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from adapt.config.decode import decode
from adapt.data import batches, journal, work, workers
from adapt.data import build as build_module
from adapt.data.prepare import prepare
from adapt.errors import UserError
from tests.data.helpers import recipe, text_of, write_jsonl
from tests.recipes import WORDS

ROOT = Path(__file__).parents[2]
CLEAN = ["tests.data.steps.strip", {"name": "tests.data.steps.min_words", "words": 4}, "tests.data.steps.seen_lines",
         {"name": "tests.data.steps.strip", "what": "noisy"}]  # fmt: skip


def records(count: int, seed: int = 0) -> list:
    """Documents of every kind of fate: kept, changed, dropped by each rule, malformed, empty."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        lines = [" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(rng.randint(1, 4))]
        record = {"text": "\n".join(lines), "stars": i % 3}
        made.append({0: '{"text": ', 1: {"text": " "}, 2: {"text": "<b>one"}}.get(rng.randint(0, 40), record))
        if made[-1] is record and rng.random() < 0.2:
            made.append({"text": f"<b>{record['text']}", "stars": 1})
    return made


@pytest.fixture
def made(tmp_path):
    """A recipe over such data, with everything that preparation can do."""
    train = write_jsonl(tmp_path / "train.jsonl", records(300))
    held_out = write_jsonl(tmp_path / "held.jsonl", [r for r in records(12) if isinstance(r, dict)])

    def made(cache: str, count: int | str = 1, **data):
        entry = {"source": f"jsonl:{train}", "clean": CLEAN, "document_weight": "stars + 0.5", "name": "train"}
        return recipe(
            [entry],
            [{"source": f"jsonl:{held_out}", "name": "held"}],
            **{"near_dedup": 0.8, "decontaminate": 6, "max_bad_lines": 0.5, "cache": str(tmp_path / cache)},
            **data,
            workers=count,
        )

    return made


@pytest.fixture
def small(monkeypatch):
    """Batches and commits as of large data."""
    monkeypatch.setattr(batches, "BATCH_DOCUMENTS", 16)
    monkeypatch.setattr(workers, "START", 0)


def files(prepared) -> dict:
    return {f"{s.label}/{n}": f["sha256"] for s in every(prepared) for n, f in s.manifest["files"].items()}


def every(prepared) -> list:
    return [*prepared.train, *prepared.eval.values()]


def test_the_shards_are_the_same_for_any_number_of_workers(made, small, tokenizer):
    found = [prepare(made(f"cache-{n}", n), tokenizer, progress=False) for n in (1, 3)]
    assert files(found[0]) == files(found[1])
    assert found[0].train[0].manifest == found[1].train[0].manifest
    assert {"train/weights.npy", "train/signatures.npy", "held/ngrams.npy"} <= set(files(found[0]))


def test_invariant_15_manifest_numbers_add_up(made, small, tokenizer):
    """Documents in = kept + dropped per rule; bytes, words, tokens recomputed from the shards agree."""
    prepared = prepare(made("cache"), tokenizer, progress=False)
    for shards in every(prepared):
        steps = shards.manifest["steps"]
        for step in steps:
            assert step["in"] == step["out"] + sum(step["dropped"].values()), step
        for before, after in itertools.pairwise(steps):
            assert (before["out"], before["bytes_out"], before["words_out"]) == (
                after["in"],
                after["bytes_in"],
                after["words_in"],
            )
        texts = [t.removesuffix("<|endoftext|>") for t in text_of(tokenizer, shards)]
        found = {
            "documents": len(texts),
            "bytes": sum(len(t.encode()) for t in texts),
            "words": sum(len(t.split()) for t in texts),
            "tokens": sum(len(f) for f in shards._tokens),
        }
        assert found == {k: shards.manifest[k] for k in found}
        assert steps[-1]["bytes_out"] == found["bytes"]
        assert steps[-1]["words_out"] == found["words"]
    names = [s["step"] for s in prepared.train[0].manifest["steps"]]
    assert names == ["read", *(c if isinstance(c, str) else c["name"] for c in CLEAN), "decontaminate", "deduplicate",
                     "tokenise"]  # fmt: skip
    steps = prepared.train[0].manifest["steps"]
    assert sum(s["changed"] > 0 for s in steps if "changed" in s) >= 3
    dropped = {reason for s in steps for reason in s["dropped"]}
    assert {"malformed", "empty", "fewer than 4 words", "nothing is left", "6-gram also in held-out data (held)"} <= dropped  # fmt: skip


def test_steps_and_their_settings_are_part_of_the_key(made, tmp_path, tokenizer):
    first = prepare(made("cache"), tokenizer, progress=False).train[0]
    path = first.manifest["source"]["path"]
    entry = {"source": f"jsonl:{path}", "clean": CLEAN[:2], "name": "train"}
    options = {"cache": str(tmp_path / "cache"), "max_bad_lines": 0.5}
    one = prepare(recipe([entry], **options), tokenizer, progress=False).train[0]
    entry = {**entry, "clean": [CLEAN[0], "tests.data.steps.min_words"]}
    other = prepare(recipe([entry], **options), tokenizer, progress=False).train[0]
    assert len({first.folder, one.folder, other.folder}) == 3


def test_a_source_may_bring_steps_of_its_own(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "<b>The fox"}, {"text": "dog"}])
    entry = {"source": f"tests.data.steps.cleaned:{path}", "clean": ["tests.data.steps.min_words"], "name": "x"}
    entry["clean"] = [{"name": "tests.data.steps.min_words", "words": 2}]
    shards = prepare(recipe([entry]), tokenizer, progress=False).train[0]
    assert text_of(tokenizer, shards) == ["The fox<|endoftext|>"]
    assert [s["step"] for s in shards.manifest["steps"]][1:3] == [
        "tests.data.steps.strip",
        "tests.data.steps.min_words",
    ]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("kill", UserError, r"was killed by signal 9.*data.workers=1"),
        ("raise", RuntimeError, "ValueError: no step can do this"),
    ],
)
def test_a_worker_that_dies_is_an_error(tmp_path, small, tokenizer, how, error, message):
    path = write_jsonl(tmp_path / "x.jsonl", records(100))
    entry = {"source": f"jsonl:{path}", "clean": [{"name": "tests.data.steps.die", "how": how}]}
    before = psutil.Process().children()
    with pytest.raises(error, match=message):
        prepare(recipe([entry], workers=2, cache=str(tmp_path / "cache")), tokenizer, progress=False)
    assert psutil.Process().children() == before


def test_small_data_starts_no_worker(made, tokenizer, monkeypatch):
    monkeypatch.setattr(workers, "_Pool", None)  # would fail if called
    assert prepare(made("cache", "auto"), tokenizer, progress=False).train[0].num_documents


SCRIPT = """
import json, signal, sys, time
from adapt.data import batches, build, journal, work, workers
from adapt.data.prepare import prepare
from tests.tiny import tiny_tokenizer
from tests.data.helpers import recipe

batches.BATCH_DOCUMENTS, workers.START, journal.SECONDS = 16, 0, 0.0
tokenise, slow = work.Work.tokenise, {slow}
def slowly(self, documents):
    print(len(documents), flush=True)
    time.sleep(slow)
    return tokenise(self, documents)
work.Work.tokenise = slowly
write = build._Preparation.write
def slowly_written(self, *args):  # workers do not know of the one above
    time.sleep(slow)
    return write(self, *args)
build._Preparation.write = slowly_written
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it, and so would this
data = json.loads(sys.argv[1])
prepare(recipe(data.pop("train"), data.pop("eval"), **data), tiny_tokenizer(), progress=False)
print("done", flush=True)
"""


def start(made, slow: float) -> subprocess.Popen:
    from adapt.config.decode import encode

    command = [sys.executable, "-c", SCRIPT.format(slow=slow), json.dumps(encode(made.data))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_preparation_goes_on_and_writes_the_same_bytes(made, small, tokenizer, count):
    """SIGKILL at some moment; the same command again."""
    whole = prepare(made("whole"), tokenizer, progress=False)
    process = start(made("killed", count), slow=0.05)
    for _ in range(random.randint(5, 15) if count == 1 else 0):
        process.stdout.readline()
    folder = Path(made("killed").data.cache) / "data"
    deadline = time.monotonic() + 60
    while not list(folder.glob("train*.part/journal.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    helpers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = folder.glob("train*.part")
    committed = json.loads((left / "journal.json").read_text())["state"]["counts"]["documents"]
    assert committed
    _, alive = psutil.wait_procs(helpers, timeout=20)
    assert not alive  # no worker outlives the process it works for
    read = []
    monkeypatch = pytest.MonkeyPatch()
    tokenise = work.Work.tokenise
    monkeypatch.setattr(work.Work, "tokenise", lambda self, d: read.append(len(d)) or tokenise(self, d))
    again = prepare(made("killed"), tokenizer, progress=False)
    monkeypatch.undo()
    assert sum(read) == whole.train[0].num_documents - committed
    assert files(again) == files(whole)
    assert again.train[0].manifest == whole.train[0].manifest
    assert not left.exists()


def test_ctrl_c_ends_at_once_and_leaves_no_worker(made):
    process = start(made("stopped", 2), slow=0.2)
    folder = Path(made("stopped").data.cache) / "data"
    deadline = time.monotonic() + 60
    while not list(folder.glob("train*.part/journal.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    helpers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) != 0
    _, alive = psutil.wait_procs(helpers, timeout=20)
    assert helpers
    assert not alive
    assert list(folder.glob("train*.part/journal.json"))  # there is something to go on with


@pytest.mark.parametrize("damage", ["journal", "key", "file", "missing"])
def test_what_does_not_fit_is_started_afresh_and_said(made, small, tokenizer, caplog, monkeypatch, damage):
    monkeypatch.setattr(journal, "SECONDS", 0.0)
    whole = prepare(made("whole"), tokenizer, progress=False)
    write = build_module._Preparation.write
    calls = itertools.count()

    def interrupted(self, *args):
        if self.sequential and next(calls) == 5:
            raise KeyboardInterrupt
        return write(self, *args)

    monkeypatch.setattr(build_module._Preparation, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(made("cut"), tokenizer, progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(batches, "BATCH_DOCUMENTS", 16)
    (left,) = (Path(made("cut").data.cache) / "data").glob("train*.part")
    file = left / "journal.json"
    if damage == "journal":
        file.write_text(file.read_text()[:100])
    elif damage == "key":
        file.write_text(json.dumps({**json.loads(file.read_text()), "key": "other"}))
    elif damage == "file":
        tokens = left / "tokens-00000.bin"
        tokens.write_bytes(bytes(tokens.stat().st_size))
    else:
        (left / "hashes.column").unlink()
    again = prepare(made("cut"), tokenizer, progress=False)
    assert "starting afresh" in caplog.text
    assert files(again) == files(whole)


def test_a_full_preparation_that_was_killed_before_its_end_reads_no_further(
    made, small, tokenizer, tmp_path, monkeypatch
):
    path = made("x").data.train[0].source.config.path
    entry = {"source": f"jsonl:{path}", "max_tokens": 2000, "name": "full"}

    def prepared(cache):
        return prepare(recipe([entry], max_bad_lines=0.5, cache=str(tmp_path / cache)), tokenizer, progress=False)

    whole = prepared("whole")
    monkeypatch.setattr(journal, "SECONDS", 0.0)
    monkeypatch.setattr(build_module._Preparation, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepared("cut")
    monkeypatch.undo()
    monkeypatch.setattr(build_module._Preparation, "tokenised", None)  # would fail if called
    assert prepared("cut").train[0].manifest == whole.train[0].manifest


def test_document_weights_lie_beside_the_tokens(made, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "w.jsonl", [{"text": f"page {i}", "educational_score": i} for i in range(1, 4)])
    entry = {"source": f"jsonl:{path}", "document_weight": "educational_score / 2 if educational_score > 1 else 0"}
    shards = prepare(recipe([entry]), tokenizer, progress=False).train[0]
    assert shards.document_weights().tolist() == [0, 1, 1.5]
    assert shards.document_weights().dtype == np.float32
    plain = prepare(recipe([{"source": f"jsonl:{path}"}]), tokenizer, progress=False).train[0]
    assert plain.document_weights() is None
    assert plain.fingerprint != shards.fingerprint


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("stars", r"w.jsonl:2: document_weight 'stars': it has no field 'stars' .*Did you mean 'star'"),
        ("-star", "w.jsonl:1: document_weight '-star': it gives -1"),
        ("kind", "it gives 'a'; a weight is a finite number"),
        ("star / 0", "division"),
        ("star - star", "gives every document 0"),
    ],
)
def test_a_weight_that_is_none_names_the_document(tokenizer, tmp_path, expression, message):
    path = write_jsonl(
        tmp_path / "w.jsonl", [{"text": "a", "star": 1, "stars": 1, "kind": "a"}, {"text": "b", "star": 1}]
    )
    with pytest.raises(UserError, match=message):
        prepare(recipe([{"source": f"jsonl:{path}", "document_weight": expression}]), tokenizer, progress=False)


def test_an_expression_that_is_none_is_a_problem_of_the_recipe():
    from adapt.data.document_weights import DocumentWeight

    for wrong in ("2 if", "", "a = 1"):
        with pytest.raises(UserError, match="is no expression"):
            DocumentWeight(wrong)


def test_the_options_have_ranges(tokenizer, tmp_path):
    from adapt.config.schema import Trainer
    from adapt.train.rules import _data

    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}])
    made = recipe([{"source": f"jsonl:{path}", "document_weight": "2 if"}], decontaminate=1, workers=0)
    made = dataclasses.replace(made, trainer=Trainer(steps=1))
    assert {p.where for p in _data(made)} == {"data.train[0].document_weight", "data.decontaminate", "data.workers"}


def test_decode_knows_the_keys():
    from adapt.config.schema import Data

    data = decode({"train": [{"source": "text:x"}]}, Data)
    assert (data.decontaminate, data.workers) == (13, "auto")
