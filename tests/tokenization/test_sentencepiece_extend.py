"""`adapt tokenizer extend` on SentencePiece folders, whole: both files out, proofs, letters."""

from __future__ import annotations

import json
import shutil

import pytest

from adapt.cli import main
from adapt.errors import UserError
from adapt.tokenization import proofs, sentencepiece_proofs
from adapt.tokenization.extend import extend
from adapt.tokenization.folder import CLASS, MARKER
from adapt.tokenization.recipe import load
from adapt.tokenization.sentencepiece_model import CONTROL, USER_DEFINED, SentencePiece
from tests.tiny import CHAT_TEMPLATE
from tests.tokenization.byte_level import ENGLISH, PORTUGUESE
from tests.tokenization.piece_models import STYLES, base, extended, folder_of, read

NUM_TOKENS = 40
elsewhere = proofs.reloaded_elsewhere, sentencepiece_proofs.model_elsewhere


@pytest.fixture(autouse=True)
def _no_other_process(monkeypatch):
    """Starting one takes seconds; the tests that are about it say so."""
    monkeypatch.setattr(proofs, "reloaded_elsewhere", lambda *args: [])
    monkeypatch.setattr(sentencepiece_proofs, "model_elsewhere", lambda *args: [])


@pytest.fixture
def recipe_file(tmp_path):
    """A recipe on a Llama-2-like folder; keys are overridden."""
    folder_of("llama", tmp_path / "base")
    for name, text in (("pt", PORTUGUESE), ("en", ENGLISH), ("held", PORTUGUESE.lower())):
        (tmp_path / f"{name}.txt").write_text(text)
    data = {
        "name": "small",
        "dir": str(tmp_path / "built"),
        "base": str(tmp_path / "base"),
        "tokens": NUM_TOKENS,
        "train": [{"source": f"path:{tmp_path / 'pt.txt'}"}],
        "eval": [{"source": f"path:{tmp_path / n}.txt", "name": n} for n in ("held", "en")],
        "workers": 1,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(data))
    return str(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("fast", [True, False], ids=["both files", "tokenizer.model alone"])
@pytest.mark.parametrize("style", STYLES)
def test_an_extended_folder_has_both_files_with_the_same_ids(recipe_file, tmp_path, style, fast, monkeypatch):
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    if style == "llama":
        monkeypatch.setattr(proofs, "reloaded_elsewhere", elsewhere[0])
        monkeypatch.setattr(sentencepiece_proofs, "model_elsewhere", elsewhere[1])
    source = folder_of(style, tmp_path / style, fast=fast)
    done = extend(load(recipe_file, [f"base={source}"]))
    assert done.num_tokens == NUM_TOKENS
    assert not any(done.proofs.values())
    assert len(done.proofs) == 7
    assert not done.warnings
    old, new = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(done.out)
    assert new.chat_template == old.chat_template == CHAT_TEMPLATE
    assert new.special_tokens_map == old.special_tokens_map
    assert new.all_special_ids == old.all_special_ids
    assert (new.model_max_length, new.padding_side) == (77, old.padding_side)
    model = SentencePieceProcessor(model_file=str(done.out / "tokenizer.model"))
    for text in (PORTUGUESE, ENGLISH, "não é"):
        assert new(text, add_special_tokens=False)["input_ids"] == model.encode(text)
    assert (new("x")["input_ids"][0] == 1) == fast  # <s>, which this folder's class puts there only if it is told to
    assert json.loads((done.out / "tokenizer_config.json").read_text())["tokenizer_class"] == CLASS
    held = {name: f.fertility for name, t, f in done.fits if t == "held"}
    assert held["small"] < held["base"]


def test_the_sweep_and_the_record_are_those_of_any_tokenizer(recipe_file):
    done = extend(load(recipe_file, ["sweep=[5, 10]"]))
    assert [p.num_tokens for p in done.points if p.text == "held"] == [0, 5, 10, NUM_TOKENS]
    small = extend(load(recipe_file, ["tokens=10", "name=ten"]))
    assert [p.fit for p in done.points if p.num_tokens == 10] == [f for name, _, f in small.fits if name == "ten"]
    record = json.loads((done.out / MARKER).read_text())
    assert record["new_tokens"] == NUM_TOKENS
    assert record["unreachable"] == 0


def test_an_extended_tokenizer_is_extended_further(recipe_file):
    first = extend(load(recipe_file, []))
    second = extend(load(recipe_file, [f"base={first.out}", "name=more", "tokens=5"]))
    once = extend(load(recipe_file, ["name=once", "tokens=45"]))
    for name in ("tokenizer.model", "tokenizer.json"):
        assert (second.out / name).read_bytes() == (once.out / name).read_bytes()


def test_no_tokens_give_the_same_files(recipe_file, tmp_path):
    done = extend(load(recipe_file, ["tokens=0"]))
    for name in ("tokenizer.model", "tokenizer.json"):
        assert (done.out / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


def test_added_tokens_above_the_pieces_keep_their_ids_in_both_files(recipe_file, tmp_path):
    source = folder_of("llama", tmp_path / "added", added=("<|end|>", "<|pad|>"))
    old = read(source)
    assert old.next_id == len(old.vocab) + 2
    done = extend(load(recipe_file, [f"base={source}"]))
    new = read(done.out)
    assert [new.proto.pieces[i].type for i in range(len(old.vocab), old.next_id)] == [CONTROL, CONTROL]
    assert new.ids["<|pad|>"] == old.ids["<|pad|>"]
    assert new.next_id == old.next_id + NUM_TOKENS == len(new.vocab)
    for i, piece in enumerate(new.proto.pieces):
        assert new.tokenizer().token_to_id(piece.piece) == i == new.processor().piece_to_id(piece.piece)
    assert USER_DEFINED not in new.types


def test_added_tokens_that_only_the_config_names_are_kept(recipe_file, tmp_path):
    """A Llama-2-style folder of a chat model, without tokenizer.json."""
    source = folder_of("llama", tmp_path / "chat", fast=False)
    size = len(base().vocab)
    config = json.loads((source / "tokenizer_config.json").read_text())
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    tokens = {str(size): {"content": "<|end|>", "special": True, **plain}}
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": tokens}))
    done = extend(load(recipe_file, [f"base={source}"]))
    new = read(done.out)
    assert new.processor().piece_to_id("<|end|>") == new.tokenizer().token_to_id("<|end|>") == size
    assert new.next_id == size + 1 + NUM_TOKENS


def test_other_names_of_the_model_are_kept(recipe_file, tmp_path):
    folder = tmp_path / "base"
    (folder / "tokenizer.model").rename(folder / "spiece.model")
    done = extend(load(recipe_file, []))
    assert [p.name for p in done.out.glob("*.model")] == ["spiece.model"]


def test_what_the_bases_own_files_disagree_on_is_counted(recipe_file, tmp_path):
    """A model whose scores were copied from another, as Cabrita's: equal scores, and no order that tokenizer.json has."""
    folder = tmp_path / "base"
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["merges"] = data["model"]["merges"][::-1]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    done = extend(load(recipe_file, []))
    assert any("disagree on" in claim for claim in done.proofs)
    assert not any(done.proofs.values())


def _edit_json(folder, edit):
    data = json.loads((folder / "tokenizer.json").read_text())
    edit(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))


def _edit_model(folder, edit):
    proto = type(base().proto)()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    edit(proto)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


def _word(data):
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    data["added_tokens"].append({"id": len(data["model"]["vocab"]), "content": "coração", **plain})


def _gap(data):
    data["added_tokens"].append(data["added_tokens"][0] | {"id": 5000, "content": "<far>"})


def _twice(data):
    data["added_tokens"].append(data["added_tokens"][0] | {"id": 7, "content": "<seven>"})


def _alone(data):
    data["model"]["vocab"]["xyz"] = len(data["model"]["vocab"])


def _shifted(data):
    data["model"]["vocab"] = {p: i + 1 for p, i in data["model"]["vocab"].items()}


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda f: (f / "tokenizer.model").unlink(), "fetch tokenizer.model from the base's repository"),
        (lambda f: _edit_json(f, _word), "1 words ('coração') were added with `add_tokens`"),
        (lambda f: _edit_json(f, _gap), "without gaps"),
        (lambda f: _edit_json(f, _twice), "two tokens have the id 7"),
        (lambda f: _edit_json(f, _alone), "1 tokens ('xyz' first) that the model beside it lacks"),
        (lambda f: _edit_json(f, _shifted), "have other ids here"),
        (lambda f: _edit_json(f, lambda d: d["model"].update(dropout=0.1)), "merge dropout"),
        (lambda f: _edit_json(f, lambda d: d.pop("model")), "`model` is missing"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be read"),
        (lambda f: _edit_json(f, lambda d: d["model"].update(type="Unigram")), "they are of two tokenizers"),
        (lambda f: _edit_model(f, lambda p: setattr(p.pieces[300], "piece", p.pieces[301].piece)), "is there twice"),
        (lambda f: _edit_model(f, lambda p: setattr(p.pieces[300], "type", 5)), "marked UNUSED"),
        (lambda f: _edit_model(f, lambda p: setattr(p.trainer_spec, "model_type", 3)), "only BPE and Unigram"),
        (lambda f: _edit_model(f, lambda p: setattr(p.pieces[300], "piece", "")), "cannot be loaded"),
        (lambda f: (f / "tokenizer.model").write_bytes(b"\n\x7f"), "tokenizer.model is damaged"),
        (lambda f: _edit_model(f, lambda p: setattr(p.normalizer_spec, "escape_whitespaces", False)), "escape_white"),
    ],
)
def test_what_cannot_be_extended_is_said(recipe_file, tmp_path, spoil, told):
    spoil(tmp_path / "base")
    with pytest.raises(UserError) as refused:
        extend(load(recipe_file, []))
    assert told in str(refused.value)
    assert {p.where for p in refused.value.problems} == {"base"}


def test_a_tiktoken_file_is_no_sentencepiece_model(recipe_file, tmp_path):
    folder = tmp_path / "base"
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no SentencePiece model"):
        extend(load(recipe_file, []))


def test_a_unigram_tokenizer_json_alone_says_what_to_fetch(recipe_file, tmp_path):
    folder = folder_of("no_bytes", tmp_path / "unigram", "unigram")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"fetch spiece\.model or tokenizer\.model"):
        extend(load(recipe_file, [f"base={folder}"]))


@pytest.mark.parametrize(
    "kind, method, told",
    [
        ("bpe", "append", "append extends byte-level BPE, and the base is SentencePiece BPE: take "),
        ("unigram", "continued_bpe", "and the base is SentencePiece Unigram: take unigram"),
        ("unigram", "cabrita", "and the base is SentencePiece Unigram: take unigram"),
        ("bpe", "unigram", "take cabrita or chinese_llama or continued_bpe"),
    ],
)
def test_a_method_for_another_kind_is_refused_before_any_text_is_read(recipe_file, tmp_path, kind, method, told):
    folder = folder_of("no_bytes", tmp_path / kind, kind)
    with pytest.raises(UserError) as refused:
        extend(load(recipe_file, [f"base={folder}", f"method={method}", "train.0.source=path:nowhere"]))
    assert {p.where for p in refused.value.problems} == {"method", "train[0].source"}
    assert told in str(refused.value)


def test_proofs_find_what_is_broken(tmp_path):
    old, new = base(), extended()
    assert proofs.ids_kept is not sentencepiece_proofs.pieces_kept
    assert sentencepiece_proofs.pieces_kept(old, new) == []
    moved = type(new.proto)()
    moved.CopyFrom(new.proto)
    moved.pieces[300].score = 5.0
    moved.normalizer_spec.add_dummy_prefix = False
    found = sentencepiece_proofs.pieces_kept(old, SentencePiece(moved, b"", new.data, new.text))
    assert len(found) == 2
    assert "became" in found[0]
    reversed_ = new.data | {"model": new.data["model"] | {"merges": new.data["model"]["merges"][::-1]}}
    other = SentencePiece(new.proto, new.stored, reversed_, json.dumps(reversed_))
    assert any("old order" in f for f in sentencepiece_proofs.pieces_kept(old, other))
    assert len(sentencepiece_proofs.both_alike(other, [PORTUGUESE, ENGLISH])) == 2
    assert len(sentencepiece_proofs.boundaries_only_removed(new, old, [PORTUGUESE])) == 1
    high = type(new.proto)()
    high.CopyFrom(new.proto)
    for piece in high.pieces[old.next_id :]:
        piece.score = 0.0
    zero = SentencePiece(high, high.SerializeToString(), new.data, new.text)
    assert len(sentencepiece_proofs.scores_below(old, zero)) == 51
    assert zero.unreachable(p.piece for p in high.pieces[old.next_id :])
    (tmp_path / "tokenizer.model").write_bytes(old.stored)
    assert len(elsewhere[1](tmp_path, new, [PORTUGUESE])) == 2  # it holds the old one
    shutil.rmtree(tmp_path)
    assert "cannot be loaded" in elsewhere[1](tmp_path, new, [PORTUGUESE])[0]


def test_the_command(recipe_file, capsys):
    assert main(["tokenizer", "extend", "-c", recipe_file, "tokens=30"]) == 0
    out = capsys.readouterr().out
    assert out.count("✓") == 7
    assert "30 tokens from" in out
