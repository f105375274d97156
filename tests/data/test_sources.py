"""What sources read, and what they say about what they cannot read."""

from __future__ import annotations

import gzip
import itertools
import json
import os

import pytest

from adapt.components import SourceChoice
from adapt.config.decode import decode
from adapt.config.schema import Data
from adapt.data import batches
from adapt.data.documents import BadRecord, Document
from adapt.data.encode import Encoder
from adapt.data.prepare import open_sources, prepare
from adapt.data.roles import TARGET
from adapt.errors import UserError
from tests.data.helpers import recipe, write_jsonl

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def source(choice):
    return decode(choice, SourceChoice).build()


def documents(choice) -> list[Document]:
    read = list(source(choice).documents())
    assert all(isinstance(d, Document) for d in read), read
    return read


def bad(choice) -> list[BadRecord]:
    return [d for d in source(choice).documents() if isinstance(d, BadRecord)]


def test_text_files_are_a_document_each_or_split(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_bytes("\ufeffzwei\r\nZeilen".encode())
    (tmp_path / "deep" / "a.md").write_text("one\n---\ntwo\n---\n\n")
    (tmp_path / "ignored.py").write_text("no")
    assert [d.text for d in documents(f"text:{tmp_path}")] == ["zwei\nZeilen", "one\n---\ntwo\n---\n\n"]
    split = documents({"name": "text", "path": f"{tmp_path}/**/*.md", "separator": "\n---\n"})
    assert [d.text for d in split] == ["one", "two"]


def test_jsonl_finds_the_usual_fields(tmp_path):
    path = write_jsonl(
        tmp_path / "all.jsonl",
        [
            {"text": "plain"},
            {"prompt": "Q", "completion": "A"},
            {"messages": CHAT},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            {"prompt": "Q", "chosen": "good", "rejected": "bad", "text": "not this"},
        ],
    )
    plain, answer, chat, sharegpt, pair = documents(f"jsonl:{path}")
    assert plain.text == "plain"
    assert (answer.prompt, answer.response) == ("Q", "A")
    assert chat.messages == sharegpt.messages == CHAT
    assert (pair.prompt, pair.chosen, pair.rejected, pair.text) == ("Q", "good", "bad", None)
    assert plain.id == f"{path}:1"


def test_fields_can_be_named(tmp_path):
    path = write_jsonl(tmp_path / "own.jsonl", [{"text": "no", "body": "yes"}])
    assert documents({"name": "jsonl", "path": str(path), "fields": {"text": "body"}})[0].text == "yes"
    (problem,) = bad({"name": "jsonl", "path": str(path), "fields": {"text": "bodi"}})
    assert "has no field 'bodi'. Did you mean 'body'?" in problem.what


def test_malformed_lines_are_named_by_file_and_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = [
        b'{"text": "fine"}',
        b'{"text": "cut',
        b"",
        b"[1, 2]",
        b'{"text": 3}',
        b'{"text": "\xff"}',
        b'{"messages": [{"role": "user", "content": "alone"}]}',
        b'{"nothing": 1}',
        b'{"text": "\\ud800"}',
        b'{"messages": [{"role": "user"}]}',
    ]
    path.write_bytes(b"\n".join(lines))
    found = {b.where.removeprefix(f"{path}:"): b.what for b in bad(f"jsonl:{path}")}
    assert list(found) == ["2", "4", "5", "6", "7", "8", "9", "10"]
    assert "not a JSON object: Unterminated string" in found["2"]
    assert "expected an object" in found["4"]
    assert "field 'text' should be text, not int" in found["5"]
    offset = path.read_bytes().index(b"\xff")
    assert f"byte {offset} (0xff) is not UTF-8" in found["6"]
    assert "no assistant turn" in found["7"]
    assert "has none of: text; prompt and response" in found["8"]
    assert "surrogate" in found["9"]
    assert "should have 'content' as text" in found["10"]


def test_gzipped_jsonl(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\n' * 50))
    assert [d.text for d in documents(f"jsonl:{path}")][:2] == ["a", "b"]
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match=r"x.jsonl.gz: cannot be read"):
        documents(f"jsonl:{path}")


def test_parquet_and_a_folder_of_everything(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["p1", None], "messages": [None, CHAT]})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    first, second = documents(f"parquet:{tmp_path}")
    assert (first.text, second.messages) == ("p1", CHAT)
    write_jsonl(tmp_path / "j.jsonl", [{"text": "j"}])
    (tmp_path / "t.txt").write_text("t")
    assert [d.text for d in documents(f"path:{tmp_path}")] == ["t", "j", "p1", None]
    assert source(f"path:{tmp_path}/j.jsonl").label == "j"


def test_damaged_parquet_is_named(tmp_path):
    (tmp_path / "p.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"p.parquet"):
        documents(f"parquet:{tmp_path}/p.parquet")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("text:{0}/none.txt", "none.txt: there is no such file or folder"),
        ("jsonl:{0}/*.jsonl", "no file matches"),
        ("text:{0}/empty", "the folder has no .txt, .md file"),
        ("jsonl:", "the path is empty"),
        ("text: ", "the path is empty"),
        ("path:{0}/x.exe", "x.exe: cannot tell what is in it; known: .txt"),
    ],
)
def test_what_is_missing_is_named(tmp_path, choice, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.exe").write_text("?")
    with pytest.raises(UserError, match=message):
        source(choice.format(tmp_path))


@pytest.mark.parametrize("name", ["text", "path"])
def test_an_empty_separator_is_refused(name, tmp_path):
    with pytest.raises(UserError, match="separator='' parts nothing"):
        source({"name": name, "path": str(tmp_path), "separator": ""})


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes('\ufeff{"text": "one"}\r\n{"text": "two"}\r\n'.encode())
    assert [d.text for d in documents(f"jsonl:{path}")] == ["one", "two"]
    path.write_bytes(b'\xef\xbb\xbf{"text": "\xff"}')
    assert "byte 13 (0xff)" in bad(f"jsonl:{path}")[0].what


def test_undecodable_bytes_are_named_by_file_and_offset(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Hallo,\n\nGrüße".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.txt:3: byte 10 \(0xfc\) is not UTF-8"):
        documents(f"text:{tmp_path}/latin.txt")


def test_encodings_by_name_and_found_out(tmp_path):
    """Windows-1252 and UTF-16 files in one folder, and JSON lines in two encodings in one file."""
    german = "Für Größe und Übermut gibt es „Bücher“ – schöne, süße Bücher über Äpfel."
    (tmp_path / "a.txt").write_bytes(german.encode("cp1252"))
    (tmp_path / "b.txt").write_bytes(german.encode("utf-16"))
    (tmp_path / "c.txt").write_bytes(german.encode("utf-8-sig"))
    mixed = [
        json.dumps({"text": f"{german} {i}"}, ensure_ascii=False).encode(("cp1252", "utf-8")[i % 2]) for i in range(9)
    ]
    (tmp_path / "m.jsonl").write_bytes(b"\r\n".join(mixed))
    (tmp_path / "w.jsonl").write_bytes(
        "\n".join(json.dumps({"text": f"{i} {german}"}, ensure_ascii=False) for i in range(3)).encode("utf-16")
    )
    read = documents({"name": "path", "path": str(tmp_path), "encoding": "auto"})
    assert [d.text.replace(german, "*") for d in read] == ["*"] * 3 + [f"* {i}" for i in range(9)] + [
        f"{i} *" for i in range(3)
    ]
    assert [d.meta["decoded_as"] for d in read[:3]] == ["cp1252", "utf-16", "utf-8"]
    assert {d.meta["decoded_as"] for d in read[-3:]} == {"utf-16"}
    named = documents({"name": "text", "path": str(tmp_path / "a.txt"), "encoding": "cp1252"})
    assert [d.text for d in named] == [german]
    assert (
        documents({"name": "jsonl", "path": str(tmp_path / "w.jsonl"), "encoding": "utf-16"})[0].text == f"0 {german}"
    )


def test_encodings_that_do_not_fit_are_named(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match=r"x.txt: byte 3 \(0xff\) is not ascii; encoding=auto"):
        documents({"name": "text", "path": str(tmp_path / "x.txt"), "encoding": "ascii"})
    (tmp_path / "x.jsonl").write_bytes('{"text": "a"}\n{"text"'.encode("utf-16") + b"\x00")
    with pytest.raises(UserError, match=r"x.jsonl, after line 1, as utf-16: cannot be read"):
        documents({"name": "jsonl", "path": str(tmp_path / "x.jsonl"), "encoding": "auto"})
    with pytest.raises(UserError, match="encoding='utf-9' is none"):
        source({"name": "jsonl", "path": str(tmp_path / "x.jsonl"), "encoding": "utf-9"})


def test_what_was_decoded_how_is_in_the_manifest(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes("süß und größer, für Übermütige".encode("cp1252"))
    (tmp_path / "b.txt").write_text("plain")
    entry = {"source": {"name": "path", "path": str(tmp_path), "encoding": "auto"}}
    manifest = prepare(recipe([entry]), tokenizer, progress=False).train[0].manifest
    assert sum(manifest["encodings"].values()) == 2
    assert manifest["encodings"]["utf-8"] == 1
    plain = {"source": f"text:{tmp_path / 'b.txt'}"}
    assert "encodings" not in prepare(recipe([plain]), tokenizer, progress=False).train[0].manifest


def test_odd_bytes_and_copies_are_counted_and_crash_nothing(tmp_path, tokenizer):
    """NULs, an empty document, the same file twice in a folder."""
    (tmp_path / "a.txt").write_bytes(b"one\x00two")
    (tmp_path / "copy.txt").write_bytes(b"one\x00two")
    write_jsonl(tmp_path / "e.jsonl", [{"text": ""}, {"text": "\x00"}])
    shards = prepare(recipe([{"source": f"path:{tmp_path}"}]), tokenizer, progress=False).train[0]
    dropped = {k: v for s in shards.manifest["steps"] for k, v in s["dropped"].items()}
    assert dropped == {"empty": 1, "exact duplicate": 1}
    assert shards.num_documents == 2


def test_fingerprint_follows_the_contents_and_options_not_the_place(tmp_path):
    def print_of(folder, **options):
        return source({"name": "jsonl", "path": str(tmp_path / folder), **options}).fingerprint()

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "x.jsonl", [{"text": "same"}])
    before = print_of("a")
    os.utime(tmp_path / "a" / "x.jsonl", (1, 1))
    assert print_of("a") == print_of("b") == before
    assert print_of("a", fields={"text": "text"}) != before
    write_jsonl(tmp_path / "a" / "x.jsonl", [{"text": "Same"}])
    assert print_of("a") != before


def test_large_files_are_fingerprinted_by_size_time_and_ends(tmp_path, monkeypatch):
    from adapt.data import files

    monkeypatch.setattr(files, "WHOLE", 100)
    monkeypatch.setattr(files, "END", 10)
    path = tmp_path / "x.txt"
    prints = set()
    for text, time in (("a" * 200, 1), ("a" * 199 + "b", 1), ("b" + "a" * 199, 1), ("a" * 200, 2), ("a" * 201, 1)):
        path.write_text(text)
        os.utime(path, (time, time))
        prints.add(source(f"text:{path}").fingerprint())
    assert len(prints) == 5


class FakeHub:
    """The two calls the hub source makes."""

    def __init__(self, monkeypatch, rows):
        import datasets
        import huggingface_hub

        self.rows, self.asked, self.sha = rows, [], "c0ffee"
        monkeypatch.setattr(datasets, "load_dataset", self.load)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)

    def dataset_info(self, id, revision=None, timeout=None):
        if self.sha is None:
            raise ConnectionError("no network\nsecond line")
        card = type("Card", (), {"get": lambda self, key: ["cc-by-4.0", "mit"]})()
        return type("Info", (), {"sha": self.sha, "card_data": card})()

    def load(self, *args, **kwargs):
        self.asked.append((args, kwargs))
        return iter(self.rows)


def test_hub_streams_a_pinned_commit(monkeypatch):
    hub = FakeHub(monkeypatch, [{"text": "one", "extra": None}, {"text": None}])
    s = source({"name": "hub", "id": "org/streamed", "config": "small", "split": "test"})
    read = list(s.documents())
    assert read[0].text == "one"
    assert isinstance(read[1], BadRecord)
    assert hub.asked == [(("org/streamed", "small"), {"split": "test", "revision": "c0ffee", "streaming": True})]
    assert (s.licence, s.label) == ("cc-by-4.0, mit", "streamed")


def test_pairs_of_the_hub_state_their_prompt_twice_and_have_it_once(monkeypatch, tokenizer):
    """The columns of HuggingFaceH4/ultrafeedback_binarized: the prompt, and whole conversations that begin with it."""
    turns = [{"role": "user", "content": "Why?"}]
    good, bad = ([*turns, {"content": x, "role": "assistant"}] for x in ("Because.", "No."))
    row = {"prompt": "Why?", "prompt_id": "c0", "chosen": good, "rejected": bad, "messages": good, "score_chosen": 8.5}
    system = {"role": "system", "content": "Be brief."}
    with_system = row | {"chosen": [system, *good], "rejected": [system, *bad]}
    FakeHub(monkeypatch, [row, with_system, row | {"prompt": turns}, row | {"rejected": bad[1:]}])
    *read, broken = source("hub:org/pairs").documents()
    assert isinstance(broken, BadRecord)
    for document in read:
        chosen, rejected = next(Encoder(tokenizer).encode([document]))
        for text, encoded in (("Because.", chosen), ("No.", rejected)):
            shown = tokenizer.decode(encoded.tokens)
            assert shown.count("Why?") == shown.count(text) == 1
            learned = [t for t, role in zip(encoded.tokens, encoded.roles, strict=True) if role == TARGET]
            assert tokenizer.decode(learned) == f"{text}<|im_end|>"
    assert read[0].meta["score_chosen"] == 8.5


def test_hub_remembers_the_commit_for_machines_without_network(monkeypatch):
    hub = FakeHub(monkeypatch, [])
    before = source("hub:org/remembered").fingerprint()
    hub.sha = None
    assert source("hub:org/remembered").fingerprint() == before
    with pytest.raises(UserError, match=r"data set org/never-seen: no network$"):
        source("hub:org/never-seen").fingerprint()
    hub.sha = "beef"
    assert source("hub:org/remembered").fingerprint() != before


def test_hub_facts_lie_in_the_cache_of_the_recipe(monkeypatch, tmp_path):
    FakeHub(monkeypatch, [])
    data = decode({"train": [{"source": "hub:org/own", "name": "x"}], "cache": str(tmp_path / "own")}, Data)
    ((_, _, opened),) = open_sources(data)[1]
    opened.fingerprint()
    assert [p.name for p in (tmp_path / "own" / "hub").iterdir()] == ["org--own@main.json"]


def test_hub_is_read_no_further_than_max_tokens(monkeypatch, tmp_path, tokenizer):
    monkeypatch.setattr(batches, "BATCH_DOCUMENTS", 4)
    read = []
    FakeHub(monkeypatch, (read.append(i) or {"text": f"page {i} of an endless book"} for i in itertools.count()))
    made = recipe([{"source": "hub:org/endless", "max_tokens": 50}], cache=str(tmp_path))
    (shards,) = prepare(made, tokenizer).train
    assert 50 <= shards.num_tokens < 100
    assert len(read) < 20


def test_hub_errors_name_the_data_set_and_the_row(monkeypatch):
    hub = FakeHub(monkeypatch, [])

    def broken(*args, **kwargs):
        yield {"text": "one"}
        raise OSError("connection reset")

    hub.load = broken
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(UserError, match="data set org/x, after row 1: connection reset"):
        list(source("hub:org/x").documents())


def test_jsonl_of_any_json_is_a_document_or_a_bad_record(tmp_path):
    values = [None, 1, "x", [], {}, {"messages": 3}, {"messages": []}, {"chosen": "a", "rejected": CHAT, "prompt": "p"},
              {"chosen": "a", "rejected": "b"}, {"prompt": 4, "response": "x"}, {"text": None}]  # fmt: skip
    path = write_jsonl(tmp_path / "odd.jsonl", [json.dumps(v) for v in values])
    assert len(bad(f"jsonl:{path}")) == len(values)
