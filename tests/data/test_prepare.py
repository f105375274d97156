"""From files to token shards in the cache, and every number on the way."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from adapt.data import batches
from adapt.data import prepare as prepare_module
from adapt.data import shards as shards_module
from adapt.data.dedup import EXACT, NEAR, held_out
from adapt.data.prepare import prepare
from adapt.data.shards import TokenShards
from adapt.errors import UserError
from tests.data.helpers import recipe, roles_of, text_of, write_jsonl

PAIRS = "tests.data.helpers.pairs_objective"
EOS = "<|endoftext|>"


@pytest.fixture
def run(tokenizer, tmp_path):
    """Prepare JSONL records (or text) as training and held-out data, in a cache of this test."""

    def run(train, eval=(), **data):
        entries = {}
        for name, records in (("train", train), ("eval", eval)):
            path = write_jsonl(tmp_path / f"{name}.jsonl", records) if records else None
            entries[name] = [{"source": f"jsonl:{path}", "name": name}] if path else []
        data = {"cache": str(tmp_path / "cache"), **data}
        if "max_tokens" in data:
            entries["train"][0]["max_tokens"] = data.pop("max_tokens")
        return prepare(recipe(entries["train"], entries["eval"], **data), tokenizer, progress=False)

    return run


def step(shards, name: str) -> dict:
    """What the manifest says of a step."""
    (found,) = [s for s in shards.manifest["steps"] if s["step"] == name]
    return found


def texts(*values):
    return [{"text": v} for v in values]


def words(seed: int, count: int = 60) -> list[str]:
    rng = random.Random(seed)
    return [
        rng.choice(
            ["the", "model", "reads", "a", "page", "and", "learns", "what", "comes", "next", "in", "every", "block"]
        )
        for _ in range(count)
    ]


def test_documents_become_shards_with_a_manifest(run, tokenizer):
    prepared = run(texts("The fox", "über", "The dog sees it"), texts("held out"))
    shards = prepared.train[0]
    assert text_of(tokenizer, shards) == [f"The fox{EOS}", f"über{EOS}", f"The dog sees it{EOS}"]
    assert shards.document_bytes.tolist() == [7, 5, 15]
    assert (shards.num_documents, shards.num_tokens) == (3, shards.document_offsets[-1])
    manifest = shards.manifest
    numbers = {k: manifest[k] for k in ("bytes", "documents", "words", "tokens", "target_tokens")}
    assert numbers == {
        "bytes": 27,
        "documents": 3,
        "words": 7,
        "tokens": shards.num_tokens,
        "target_tokens": shards.num_tokens,
    }
    assert manifest["parts"] == {"train.jsonl": 3}
    assert all(set(f) == {"bytes", "sha256"} for f in manifest["files"].values())
    assert list(prepared.eval) == ["eval"]
    shards.verify()
    assert not shards.has_roles
    assert not (shards.folder / "roles-00000.bin").exists()


def test_finished_shards_are_used_again(run, monkeypatch):
    first = run(texts("a b", "c d"), texts("e f"))
    monkeypatch.setattr(prepare_module, "build", None)  # would fail if called
    again = run(texts("a b", "c d"), texts("e f"))
    assert again.fingerprint == first.fingerprint
    assert [s.folder for s in again.train] == [s.folder for s in first.train]


def test_changed_data_tokenizer_or_options_are_prepared_anew(run, tokenizer):
    from tests.tiny import tiny_tokenizer

    first = run(texts("a b", "c d"))
    assert run(texts("a b", "c e")).fingerprint != first.fingerprint
    assert run(texts("a b", "c d")).fingerprint == first.fingerprint
    assert run(texts("a b", "c d"), exact_dedup=False).train[0].folder != first.train[0].folder
    other = prepare(recipe([{"source": first.train[0].manifest["source"]}]), tiny_tokenizer(280), progress=False)
    assert other.train[0].manifest["tokenizer"] != first.train[0].manifest["tokenizer"]


def test_exact_duplicates_are_dropped(run, tokenizer):
    shards = run(texts("The fox", "the  FOX\n", "dog", "The fox")).train[0]
    assert text_of(tokenizer, shards) == [f"The fox{EOS}", f"dog{EOS}"]
    found = step(shards, "deduplicate")
    assert {k: found[k] for k in ("in", "out", "dropped")} == {"in": 4, "out": 2, "dropped": {EXACT: 2}}
    assert run(texts("The fox", "the  FOX\n"), exact_dedup=False).train[0].num_documents == 2


def test_near_duplicates_are_dropped(run):
    page, other = words(0, 200), words(1, 200)
    almost = [*page[:100], "suddenly", *page[101:]]
    half = [*page[:100], *other[100:]]
    records = texts(*(" ".join(w) for w in (page, almost, other, half)))
    assert run(records).train[0].num_documents == 4
    shards = run(records, near_dedup=0.8).train[0]
    assert shards.num_documents == 3
    assert step(shards, "deduplicate")["dropped"] == {NEAR: 1}


def test_training_documents_that_are_also_held_out_are_dropped(run, tokenizer):
    page = words(0, 200)
    almost = " ".join([*page[:100], "suddenly", *page[101:]])
    prepared = run(texts("The fox", "dog", almost), texts("cat", "the fox", " ".join(page)), near_dedup=0.8)
    assert text_of(tokenizer, prepared.train[0]) == [f"dog{EOS}"]
    assert step(prepared.train[0], "decontaminate")["dropped"] == {"13-gram also in held-out data (eval)": 2}
    assert prepared.eval["eval"].num_documents == 3
    with pytest.raises(UserError, match=r"to use: 1 read, of them 1 13-gram also in held-out data \(eval\)"):
        run(texts("cat"), texts("Cat"))
    prepared = run(
        texts("The fox", "dog", almost), texts("cat", "the fox", " ".join(page)), near_dedup=0.8, decontaminate=None
    )
    assert text_of(tokenizer, prepared.train[0]) == [f"dog{EOS}"]
    assert step(prepared.train[0], "deduplicate")["dropped"] == {held_out("eval"): 2}


def test_reading_stops_at_max_tokens(run, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_DOCUMENTS", 4)
    records = texts(*(" ".join(words(i)) for i in range(40)))
    shards = run(records, max_tokens=300).train[0]
    assert 300 <= shards.num_tokens < 300 + 400
    assert shards.num_documents < 20
    assert shards.manifest["steps"][0]["in"] < 24  # the rest was not even read
    whole = run(records).train[0]
    assert np.array_equal(whole.tokens(0, shards.num_tokens), shards.tokens(0, shards.num_tokens))


def test_malformed_lines_are_listed_up_to_the_threshold(run):
    records = [*texts(*"abcdefghijklmnopqrstuvwxyz"), '{"text": "cut']
    shards = run(records, max_bad_lines=0.05).train[0]
    assert shards.manifest["bad_lines"]["count"] == 1
    assert shards.manifest["bad_lines"]["listed"][0]["where"].endswith("train.jsonl:27")
    with pytest.raises(
        UserError, match=r"(?s)1 of 27 records are malformed.*max_bad_lines=0.01.*train.jsonl:27: not a JSON"
    ):
        run(records, max_bad_lines=0.01)


def test_the_threshold_also_holds_for_what_lies_in_the_cache(run):
    records = [*texts("a", "b", "c"), "{"]
    run(records, max_bad_lines=0.5)
    with pytest.raises(UserError, match="1 of 4 records are malformed"):
        run(records)


def test_a_conversation_without_an_assistant_counts_as_malformed(run):
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    with pytest.raises(UserError, match=r"(?s)1 of 2 records.*train.jsonl:2: field 'messages' has no assistant turn"):
        run([*texts("a"), chat])


def test_conversations_keep_their_roles_and_plain_text_beside_them(run, tokenizer):
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}
    shards = run([*texts("plain"), chat]).train[0]
    plain, roles = roles_of(shards)
    assert set(plain) == {2}
    answer = shards.tokens(*shards.document_offsets[1:3].tolist())[np.array(roles) == 2]
    assert tokenizer.decode(answer) == "Yes<|im_end|>"
    assert shards.has_roles
    assert shards.manifest["target_tokens"] == len(plain) + len(answer)


def test_preference_pairs_are_two_documents(run, tokenizer):
    records = [{"prompt": f"Q{i}", "chosen": f"good{i}", "rejected": f"bad{i}"} for i in range(3)]
    shards = run(records, objective=PAIRS).train[0]
    assert shards.has_pairs
    assert [t.split("assistant\n")[1].strip() for t in text_of(tokenizer, shards)] == [
        f"{w}{i}<|im_end|>" for i in range(3) for w in ("good", "bad")
    ]
    assert shards.manifest["documents"] == 3
    with pytest.raises(UserError, match=r"train.jsonl:4: preference pairs and other records are mixed"):
        run([*records, *texts("plain")], objective=PAIRS)


def test_preference_pairs_need_an_objective_that_compares(run):
    """Any other one would learn the rejected answers too."""
    pairs = [{"prompt": "Q", "chosen": "good", "rejected": "bad"}]
    with pytest.raises(UserError, match=r"data.train\[0\].source: these are preference pairs.*objective next_token"):
        run(pairs)
    with pytest.raises(UserError, match=r"data.eval\[0\].source: these are preference pairs"):
        run(texts("plain"), pairs)
    with pytest.raises(UserError, match=r"data.train\[0\].source: .*learns from preference pairs"):
        run(texts("plain"), pairs, objective=PAIRS)


def test_measuring_prepares_the_held_out_sets_alone(tokenizer, tmp_path):
    held_out = write_jsonl(tmp_path / "held-out.jsonl", texts("a page"))
    made = recipe([{"source": f"jsonl:{tmp_path}/not-here.jsonl"}], [{"source": f"jsonl:{held_out}"}])
    assert list(prepare(made, tokenizer, train=False).eval) == ["held-out"]


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_empty_data_is_named(tokenizer, tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=r"data.train\[0\].source: .*empty.txt: there is no document in it$"):
        prepare(recipe([{"source": f"text:{path}"}]), tokenizer, progress=False)


def test_all_missing_sources_are_reported_together(tokenizer, tmp_path):
    entries = [{"source": f"text:{tmp_path}/one.txt"}, {"source": f"jsonl:{tmp_path}/two.jsonl"}]
    with pytest.raises(UserError) as caught:
        prepare(recipe(entries, entries[:1]), tokenizer, progress=False)
    assert [p.where for p in caught.value.problems] == [
        "data.eval[0].source",
        "data.train[0].source",
        "data.train[1].source",
    ]


def test_held_out_sets_need_names_of_their_own(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", texts("a"))
    with pytest.raises(UserError, match=r"data.eval: two entries are called 'x'"):
        prepare(recipe([{"source": f"jsonl:{path}"}], [{"source": f"jsonl:{path}"}] * 2), tokenizer, progress=False)


@pytest.mark.parametrize("name", ["tokens-00000.bin", "documents.npy"])
def test_a_truncated_shard_is_named_when_opened(run, name):
    folder = run(texts("a b c", "d e f")).train[0].folder
    file = folder / name
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match=rf"{name}: the prepared data is damaged: it has .* bytes instead of"):
        run(texts("a b c", "d e f"))
    file.unlink()
    with pytest.raises(UserError, match=f"{name}: .*missing"):
        TokenShards(folder)


def test_a_changed_shard_is_found_by_verify(run):
    shards = run(texts("a b c", "d e f")).train[0]
    file = shards.folder / "tokens-00000.bin"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(UserError, match="its contents changed"):
        TokenShards(shards.folder).verify()


def test_a_failure_leaves_nothing_half_done(run, monkeypatch, tmp_path):
    """Killed or failed while writing: no folder of the final name, and the next try starts afresh."""
    write = shards_module.ShardWriter.add
    monkeypatch.setattr(
        shards_module.ShardWriter, "add", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(UserError, match=r"preparing data failed: No space left on device; `data.cache`"):
        run(texts("a", "b"))
    data = tmp_path / "cache" / "data"
    assert [p.name for p in data.iterdir() if p.is_dir()] == []
    monkeypatch.setattr(shards_module.ShardWriter, "add", write)
    shards = run(texts("a", "b")).train[0]
    leftover = shards.folder.with_name(shards.folder.name + ".part")
    shards.folder.rename(leftover)  # as if killed before the rename
    (leftover / "manifest.json").write_text("{")
    assert run(texts("a", "b")).train[0].num_documents == 2
    assert not leftover.exists()


def test_shards_are_split_between_documents(run, tokenizer, monkeypatch):
    monkeypatch.setattr(shards_module, "SHARD_TOKENS", 40)
    records = texts(*(" ".join(words(i, 10)) for i in range(12)))
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}
    shards = run([*records, chat]).train[0]
    names = sorted(n for n in shards.manifest["files"] if n.endswith(".bin"))
    assert len([n for n in names if n.startswith("tokens")]) > 3
    assert len([n for n in names if n.startswith("roles")]) == 1  # only where there is context
    assert text_of(tokenizer, shards)[:12] == [r["text"] + EOS for r in records]
    everything = shards.tokens(0, shards.num_tokens)
    assert len(everything) == len(shards.roles(0, shards.num_tokens)) == shards.num_tokens


def test_the_manifest_is_plain_json(run):
    prepared = run(texts("a"), texts("b"))
    assert json.loads(json.dumps(prepared.manifest))["train"][0]["label"] == "train"
