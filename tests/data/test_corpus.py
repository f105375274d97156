"""Corpora as files, and their split by what documents say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from adapt.components import CleanerChoice, SourceChoice
from adapt.config.decode import decode
from adapt.data.corpora import load_corpus, shipped_corpora
from adapt.data.documents import BadRecord, Document
from adapt.data.splits import Split, place, share
from adapt.errors import NotReachable, UserError
from tests.data.helpers import write_jsonl

PARTS = ("train", "val", "test")


def source(tmp_path, corpus: Path | str, **options):
    made = decode({"name": "corpus", "id": str(corpus), **options}, SourceChoice).build()
    made.use_cache(tmp_path / "cache")
    return made


def write(path: Path, sources, **more) -> Path:
    path.write_text(yaml.safe_dump({"about": "Made up.", "sources": sources, **more}))
    return path


@pytest.fixture
def corpus(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"page {i} of the book"} for i in range(200)])
    write_jsonl(tmp_path / "b.jsonl", [{"text": f"entry {i} of the log"} for i in range(100)])
    sources = [{"source": f"jsonl:{tmp_path}/{n}.jsonl", "licence": f"L-{n}"} for n in "ab"]
    return write(tmp_path / "own.yaml", sources, clean=["unicode", {"name": "length", "min_words": 3}],
                 split={"val": 0.2, "test": 0.2})  # fmt: skip


def texts(made) -> list[str]:
    return [d.text for d in made.documents()]


def test_the_parts_are_disjoint_and_together_all(tmp_path, corpus):
    """Invariant 14: validation and test share no document with training."""
    parts = {name: texts(source(tmp_path, corpus, split=name)) for name in PARTS}
    assert sorted(t for part in parts.values() for t in part) == sorted(texts(source(tmp_path, corpus, split="all")))
    assert sum(map(len, parts.values())) == 300
    assert not set(parts["train"]) & {*parts["val"], *parts["test"]}
    assert not set(parts["val"]) & set(parts["test"])
    assert all(35 <= len(parts[name]) <= 85 for name in ("val", "test"))


def test_splits_are_stable_when_files_are_reordered(tmp_path, corpus):
    """Invariant 14: other files, other names, another order: every document stays in its part."""
    before = {name: set(texts(source(tmp_path, corpus, split=name))) for name in PARTS}
    moved = [{"text": d} for d in sorted(set().union(*before.values()), reverse=True)]
    write_jsonl(tmp_path / "moved.jsonl", [*moved, {"text": "a document that came later"}])
    again = write(tmp_path / "again.yaml", [{"source": f"jsonl:{tmp_path}/moved.jsonl", "licence": "x"}],
                  split={"val": 0.2, "test": 0.2})  # fmt: skip
    for name in PARTS:
        assert set(texts(source(tmp_path, again, split=name))) - {"a document that came later"} == before[name]


@given(st.text(min_size=1, max_size=60), st.floats(0, 0.4), st.floats(0, 0.4))
def test_copies_of_a_text_are_on_one_side(text, val, test):
    split = Split(val=val, test=test)
    copy = Document(id="elsewhere", text=f"  {text.upper()} \n" if text.upper().casefold() == text.casefold() else text)
    assert split.part(place(Document(id="x", text=text))) == split.part(place(copy))


@given(st.text(max_size=60))
def test_places_lie_in_the_unit_interval(text):
    document = Document(id="x", text=text)
    assert 0 <= place(document) < 1
    assert 0 <= share(document) < 1
    assert place(document) != share(document)


@given(st.floats(0, 1, exclude_max=True), st.floats(0, 0.3), st.floats(0, 0.3), st.floats(0, 0.3))
def test_a_larger_part_only_takes_from_training(where, test, val, more):
    before, after = Split(val=val, test=test).part(where), Split(val=val + more, test=test).part(where)
    assert after == before or (before, after) == ("train", "val")


def test_fractions_must_leave_training_data():
    for split in ({"val": 0.5, "test": 0.5}, {"val": -0.1, "test": 0}):
        with pytest.raises(UserError, match="fractions that leave something for training"):
            decode(split, Split)


def test_documents_carry_licence_and_source_and_the_corpus_its_steps(tmp_path, corpus):
    made = source(tmp_path, corpus)
    assert made.clean == tuple(decode(c, CleanerChoice) for c in ("unicode", {"name": "length", "min_words": 3}))
    assert made.licence == "a: L-a; b: L-b"
    assert {(d.meta["part"], d.meta["licence"], d.meta["split"]) for d in made.documents()} == {
        ("a", "L-a", "train"),
        ("b", "L-b", "train"),
    }
    assert (made.label, source(tmp_path, corpus, split="all").label) == ("own-train", "own")


def test_the_sources_take_turns_by_characters(tmp_path, corpus):
    """Whatever is cut off the end, the beginning has as much of each source as of the others."""
    write_jsonl(tmp_path / "b.jsonl", [{"text": f"entry {i} " + "of a very long log " * 10} for i in range(100)])
    first, second = (texts(source(tmp_path, corpus, split="all")) for _ in range(2))
    assert first == second
    characters = {"page": 0, "entry": 0}
    for text in first[:100]:
        characters[text.split()[0]] += len(text)
    assert abs(characters["page"] - characters["entry"]) <= max(map(len, first))
    for word in characters:
        numbers = [int(t.split()[1]) for t in first if t.startswith(word)]
        assert numbers == sorted(numbers)  # within a source, in its order


def test_a_fraction_of_a_source_is_no_prefix_of_it(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"page {i}"} for i in range(400)])
    entry = {"source": f"jsonl:{tmp_path}/a.jsonl", "licence": "x"}
    some = texts(source(tmp_path, write(tmp_path / "some.yaml", [entry | {"fraction": 0.25}]), split="all"))
    assert 60 < len(some) < 140
    assert int(some[-1].split()[1]) > 300
    more = texts(source(tmp_path, write(tmp_path / "more.yaml", [entry | {"fraction": 0.5}]), split="all"))
    assert set(some) < set(more)
    few = write(tmp_path / "few.yaml", [entry | {"max_documents": 3}])
    assert texts(source(tmp_path, few, split="all")) == ["page 0", "page 1", "page 2"]


def test_sources_can_be_chosen(tmp_path, corpus):
    assert {t.split()[0] for t in texts(source(tmp_path, corpus, only=["b"]))} == {"entry"}
    with pytest.raises(UserError, match=r"has no source 'bb'. Did you mean 'b'\? It has: a, b"):
        source(tmp_path, corpus, only=["bb"])


def test_the_fingerprint_follows_everything_that_chooses_documents(tmp_path, corpus):
    plain = yaml.safe_load(corpus.read_text())
    prints = {source(tmp_path, corpus).fingerprint(), source(tmp_path, corpus, split="val").fingerprint()}
    prints.add(source(tmp_path, corpus, only=["a"]).fingerprint())
    for change in ({"split": {"val": 0.1, "test": 0.2}}, {"clean": ["unicode"]}, {"sources": plain["sources"][:1]}):
        corpus.write_text(yaml.safe_dump(plain | change))
        prints.add(source(tmp_path, corpus).fingerprint())
    assert len(prints) == 6 - 1  # the first source alone is the first source alone
    corpus.write_text(yaml.safe_dump(plain))
    assert source(tmp_path, corpus).fingerprint() in prints
    write_jsonl(tmp_path / "a.jsonl", [{"text": "other"}])
    assert source(tmp_path, corpus).fingerprint() not in prints


def test_malformed_records_are_passed_on(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["{", {"text": "fine words"}])
    own = write(tmp_path / "own.yaml", [{"source": f"jsonl:{path}", "licence": "x"}])
    assert [type(d) for d in source(tmp_path, own, split="all").documents()] == [BadRecord, Document]


def test_all_problems_of_a_corpus_are_told_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(
        "sources:\n- source: jsonl:x\n  licens: x\n- source: {name: jsonk}\n  licence: x\nclean: [unicod]\nsplit: {val: x}\n"
    )
    with pytest.raises(UserError) as caught:
        source(tmp_path, path)
    told = {p.where.removeprefix(f"{path}: "): p.what for p in caught.value.problems}
    assert {"about", "sources[0].licence", "sources[0].licens", "sources[1].source", "clean[0]", "split.val"} <= set(
        told
    )
    assert "Did you mean 'licence'" in told["sources[0].licens"]
    assert "Did you mean 'unicode'" in told["clean[0]"]


def test_sources_that_cannot_be_opened_are_named_with_their_place(tmp_path):
    entries = [{"source": f"jsonl:{tmp_path}/{n}.jsonl", "licence": "x"} for n in ("none", "nothing")]
    with pytest.raises(UserError) as caught:
        source(tmp_path, write(tmp_path / "own.yaml", entries))
    assert [p.where.rpartition(": ")[2] for p in caught.value.problems] == ["sources[0].source", "sources[1].source"]


def test_corpora_do_not_nest_and_names_are_unique(tmp_path, corpus):
    nested = write(tmp_path / "outer.yaml", [{"source": f"corpus:{corpus}", "licence": "x"}])
    with pytest.raises(UserError, match="cannot hold another corpus"):
        source(tmp_path, nested)
    twice = [{"source": f"jsonl:{tmp_path}/a.jsonl", "licence": "x"}] * 2
    with pytest.raises(UserError, match="two sources are called 'a'"):
        source(tmp_path, write(tmp_path / "twice.yaml", twice))


def test_unknown_corpora_are_told_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"no corpus 'cybersecurty'. Did you mean 'cybersecurity'\? Shipped: cyber"):
        source(tmp_path, "cybersecurty")
    with pytest.raises(UserError, match="there is no corpus file"):
        source(tmp_path, tmp_path / "none.yaml")
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(UserError, match="x.yaml: cannot be read"):
        source(tmp_path, tmp_path / "x.yaml")


def test_what_is_out_of_reach_is_told_for_every_source(tmp_path):
    nowhere = {"name": "debian", "suite": "bookworm", "archive": (tmp_path / "nowhere").as_uri()}
    entries = [{"source": nowhere | {"package": name}, "licence": "x"} for name in ("one", "two")]
    made = source(tmp_path, write(tmp_path / "far.yaml", entries))
    assert made.remote
    made.check()  # nothing is fetched for it
    assert not (tmp_path / "cache").exists()
    with pytest.raises(NotReachable) as caught:
        made.fingerprint()
    assert [p.what.partition(":")[0].rpartition(", ")[2] for p in caught.value.problems] == ["one", "two"]


@pytest.mark.parametrize("name", shipped_corpora())
def test_shipped_corpora_open_without_the_network(name, tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr(socket, "create_connection", None)
    corpus, opened = load_corpus(name)
    assert corpus.about.endswith(".")
    assert all(part.licence for part, _ in opened)
    steps = [choice.name for choice in corpus.clean]
    assert steps[-1] == "lines"
    assert {"unicode", "quality", "secrets"} <= set(steps)
    made = source(tmp_path, name)
    assert json.dumps([label for label, _, _ in made.parts_of_corpus])


def test_what_ships_is_pinned_or_names_its_release():
    for name in ("cybersecurity", "english", "portuguese"):
        for part, _ in load_corpus(name)[1]:
            config = part.source.config
            stated = [getattr(config, key, None) or "" for key in ("suite", "package", "path")]
            assert stated[0] == "bookworm" or any("#sha256=" in text for text in stated)
