"""`adapt tokenizer extend` and `report`, whole: folders in, folders out, proofs, letters."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from adapt.cli import main
from adapt.errors import UserError
from adapt.tokenization import proofs
from adapt.tokenization.byte_bpe import ByteBpe
from adapt.tokenization.extend import extend
from adapt.tokenization.folder import CLASS, CONFIG, MARKER, TEMPLATE
from adapt.tokenization.metrics import change, fit, unreachable_pieces
from adapt.tokenization.recipe import load, shipped_tokenizers
from tests.tiny import CHAT_TEMPLATE
from tests.tokenization.byte_level import ENGLISH, PORTUGUESE, SPECIALS, STYLES, base, extended

NUM_TOKENS = 40
elsewhere = proofs.reloaded_elsewhere


@pytest.fixture(autouse=True)
def _no_other_process(monkeypatch):
    """Starting one takes seconds; the tests that are about it say so."""
    monkeypatch.setattr(proofs, "reloaded_elsewhere", lambda *args: [])


def folder_of(style: str, path):
    """As transformers 5 saves it: a class of its own, the template in a file."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base(style).tokenizer(), eos_token=SPECIALS[0], pad_token=SPECIALS[2], model_max_length=77
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    fields = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(fields | {"tokenizer_class": "TokenizersBackend", "is_local": True}))
    assert (path / TEMPLATE).is_file()
    return path


@pytest.fixture
def recipe_file(tmp_path):
    """A recipe on a SmolLM2-like tokenizer; keys are overridden."""
    folder_of("smollm2", tmp_path / "base")
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


@pytest.mark.parametrize("style", STYLES)
def test_an_extended_folder_loads_everywhere_with_the_same_ids(recipe_file, tmp_path, style, monkeypatch):
    from transformers import AutoTokenizer

    if style == "llama3":
        monkeypatch.setattr(proofs, "reloaded_elsewhere", elsewhere)

    source = folder_of(style, tmp_path / style)
    (source / "vocab.json").write_text("{}")  # of the old vocabulary
    done = extend(load(recipe_file, [f"base={source}"]))
    assert done.num_tokens == NUM_TOKENS
    assert not any(done.proofs.values())
    assert len(done.proofs) == 5
    assert not done.warnings
    old, new = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(done.out)
    assert new.chat_template == old.chat_template == CHAT_TEMPLATE
    assert new.all_special_ids == old.all_special_ids
    assert new.model_max_length == 77
    raw = ByteBpe.read(done.out).tokenizer()
    for text in (PORTUGUESE, ENGLISH, f"não{SPECIALS[0]}é"):
        assert new(text)["input_ids"] == raw.encode(text).ids
        assert len(new(text)["input_ids"]) <= len(old(text)["input_ids"])
    fields = json.loads((done.out / CONFIG).read_text())
    assert fields["tokenizer_class"] == CLASS  # which version 4 of transformers knows
    assert fields["chat_template"] == CHAT_TEMPLATE  # where its earlier versions look
    assert "is_local" not in fields
    assert not (done.out / "vocab.json").exists()
    (held, base_held), (held_new, _) = [(f, t) for name, t, f in done.fits if t == "held"]
    assert base_held == "held"
    assert held_new.fertility < held.fertility


def test_what_is_being_done_is_told(recipe_file):
    told = []
    extend(load(recipe_file, []), told.append)
    assert [line.partition(" ")[0] for line in told] == ["reading", "reading", "counting", "learning", "writing,"]


def test_the_record_says_what_was_made(recipe_file):
    done = extend(load(recipe_file, []))
    record = json.loads((done.out / MARKER).read_text())
    assert record["new_tokens"] == NUM_TOKENS
    assert record["first_new_id"] == base().next_id
    assert record["recipe"]["method"]["name"] == "continued_bpe"
    assert {f["text"] for f in record["fit"]} == {"held", "en"}


def test_a_built_tokenizer_is_replaced_and_a_foreign_folder_is_not(recipe_file, tmp_path):
    extend(load(recipe_file, []))
    again = extend(load(recipe_file, ["tokens=10"]))
    assert ByteBpe.read(again.out).next_id == base().next_id + 10
    assert [p.name for p in again.out.parent.iterdir()] == ["small"]
    with pytest.raises(UserError, match="was not made by"):
        extend(load(recipe_file, [f"dir={tmp_path}", "name=base"]))


def test_an_extended_tokenizer_is_extended_further(recipe_file):
    """The same texts: 40 and then 5 more are the 45 of one go."""
    first = extend(load(recipe_file, []))
    second = extend(load(recipe_file, [f"base={first.out}", "name=more", "tokens=5"]))
    once = extend(load(recipe_file, ["name=once", "tokens=45"]))
    assert ByteBpe.read(second.out).data == ByteBpe.read(once.out).data


def test_no_tokens_give_the_same_file(recipe_file, tmp_path):
    done = extend(load(recipe_file, ["tokens=0"]))
    assert (done.out / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()


def test_a_small_corpus_gives_what_it_has_and_says_so(recipe_file):
    done = extend(load(recipe_file, ["tokens=5000"]))
    assert done.num_tokens < 5000
    assert "only" in done.warnings[0]
    with pytest.raises(UserError, match="may be merged"):
        extend(load(recipe_file, ["method={name: continued_bpe, min_frequency: 1000}"]))


def test_all_problems_are_told_at_once(recipe_file, tmp_path):
    changes = [f"base={tmp_path / 'none'}", "train.0.source=path:nowhere", "eval.1.name=held"]
    with pytest.raises(UserError) as refused:
        extend(load(recipe_file, changes))
    assert {p.where for p in refused.value.problems} == {"base", "train[0].source", "eval"}


def test_the_sweep_is_what_smaller_extensions_give(recipe_file):
    done = extend(load(recipe_file, ["sweep=[5, 10]"]))
    assert [p.num_tokens for p in done.points if p.text == "held"] == [0, 5, 10, NUM_TOKENS]
    small = extend(load(recipe_file, ["tokens=10", "name=ten"]))
    assert [p.fit for p in done.points if p.num_tokens == 10] == [f for name, _, f in small.fits if name == "ten"]
    first, second = [p for p in done.points if p.text == "held"][:2]
    assert first.gain is None
    assert second.gain == pytest.approx(200 * (second.fit.bytes_per_token - first.fit.bytes_per_token))
    assert (done.out / "gain.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((done.out / MARKER).read_text())["sweep"]) == 8


def test_an_appended_fresh_vocabulary_is_worse_and_says_what_is_never_reached(recipe_file):
    """The comparison of spec B.1: the same number of tokens, learned from scratch and appended."""
    continued = extend(load(recipe_file, []))
    appended = extend(load(recipe_file, ["method=append", "name=appended"]))
    assert appended.num_tokens == NUM_TOKENS
    assert "reached by no text" in appended.warnings[0]
    assert len(appended.proofs) == 3  # it promises neither reach nor boundaries
    tokens = [next(f.tokens for name, text, f in done.fits if name != "base") for done in (continued, appended)]
    assert tokens[0] < tokens[1]
    assert ByteBpe.read(appended.out).merges[: len(base().merges)] == base().merges


def test_without_held_out_text_the_proofs_run_over_what_was_learned_from(recipe_file):
    done = extend(load(recipe_file, ["eval=[]"]))
    assert any("in 1 texts" in claim for claim in done.proofs)
    assert done.fits == []


def test_a_broken_promise_is_not_written(recipe_file, monkeypatch):
    monkeypatch.setattr(proofs, "new_tokens_reached", lambda old, new: ["ção"])
    with pytest.raises(UserError, match="not so: all 40 new tokens are reached"):
        extend(load(recipe_file, []))
    assert not load(recipe_file, []).out.exists()
    assert not list(load(recipe_file, []).out.parent.iterdir())


def test_proofs_find_what_is_broken(tmp_path):
    old, new = base("gpt2"), extended("gpt2")
    assert proofs.ids_kept(old, new) == []
    data = json.loads(new.text)
    naive_vocab = {t: i for t, i in data["model"]["vocab"].items() if t not in SPECIALS}
    stolen = ByteBpe(*[d := data | {"model": data["model"] | {"vocab": naive_vocab}}, json.dumps(d)])
    assert any("is loaded as" in found for found in proofs.ids_kept(old, stolen))  # spec B.3.2
    first = data | {"model": data["model"] | {"merges": data["model"]["merges"][::-1]}}
    reordered = ByteBpe(first, json.dumps(first))
    assert any("merges" in found for found in proofs.ids_kept(old, reordered))
    assert proofs.boundaries_only_removed(old, new, [PORTUGUESE, ENGLISH]) == []
    assert len(proofs.boundaries_only_removed(new, old, [PORTUGUESE, ENGLISH])) == 2
    folders = [folder_of(style, tmp_path / style) for style in ("gpt2", "smollm2")]
    assert proofs.specials_unchanged(folders[0], folders[0]) == []
    assert any("special ids" in found for found in proofs.specials_unchanged(*folders))
    assert len(elsewhere(folders[0], new, [PORTUGUESE])) == 3  # it holds the old one


def test_fit_counts_by_hand():
    from tokenizers import Tokenizer

    one = fit(base("gpt2").tokenizer(), ["é é", "ab"])
    assert (one.words, one.characters, one.bytes) == (3, 5, 7)
    tokens = [t for text in ("é é", "ab") for t in base("gpt2").tokenizer().encode(text).tokens]
    assert one.tokens == len(tokens)
    assert one.lone == sum(t in ("Ã", "©", "ĠÃ") for t in tokens) > 0
    assert one.fertility == one.tokens / 3
    assert one.used == len(set(tokens))
    with pytest.raises(ValueError, match="no word"):
        fit(base("gpt2").tokenizer(), [" \n"])
    assert isinstance(base("gpt2").tokenizer(), Tokenizer)


def test_change_counts_lines():
    old, new = base().tokenizer(), extended().tokenizer()
    one = change(old, new, base().next_id, ["the quick fox\n\ncoração", "não"])
    assert (one.lines, one.changed, one.broken) == (3, 2, 0)
    assert one.changed_rate == 2 / 3
    ids = [i for line in ("coração", "não") for i in new.encode(line).ids]
    assert one.new_used == len({i for i in ids if i >= base().next_id})
    garbled = base().tokenizer()
    garbled.add_tokens(["coração"])  # which a byte-level decoder cannot spell (spec B.3.1)
    assert change(old, garbled, base().next_id, ["coração"]).broken == 1


def test_unreachable_pieces_are_those_that_no_merge_makes():
    assert unreachable_pieces(base().tokenizer()) == []
    assert unreachable_pieces(base().extended([], ["xyzzy"]).tokenizer()) == ["xyzzy"]


def test_the_commands(recipe_file, tmp_path, capsys):
    assert main(["tokenizer", "extend", "-c", recipe_file, "tokens=30"]) == 0
    out = capsys.readouterr().out
    assert out.count("✓") == 5
    assert "30 tokens from" in out
    assert "held: " in out
    built, text = str(tmp_path / "built" / "small"), str(tmp_path / "held.txt")
    assert main(["tokenizer", "report", str(tmp_path / "base"), built, "--text", text]) == 0
    assert capsys.readouterr().out.count("unreachable: 0") == 2
    assert main(["tokenizer", "report", built, "--text", text, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["fit"]
    assert row["fertility"] == row["tokens"] / row["words"]


def _other(model: dict):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


def test_other_kinds_of_tokenizers_are_measured_too():
    """Byte pieces and unknown tokens are no whole characters."""
    pieces = ["<unk>", "a", "b", "ab", "abc", "<0xC3>", "<0xA9>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    bpe = _other({"type": "BPE", "vocab": vocab, "merges": [["a", "b"]], "unk_token": "<unk>", "byte_fallback": True})
    one = fit(bpe, ["abéx"])
    assert (one.tokens, one.lone) == (4, 3)
    assert unreachable_pieces(bpe) == ["abc"]
    scored = [["<unk>", 0.0], ["a", -1.0], ["b", -1.0], ["ab", -3.0], ["ba", -1.5]]
    unigram = _other({"type": "Unigram", "vocab": scored, "unk_id": 0, "byte_fallback": False})
    assert (fit(unigram, ["bax"]).tokens, fit(unigram, ["bax"]).lone) == (2, 1)
    assert unreachable_pieces(unigram) == ["ab"]
    word = {"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}
    assert unreachable_pieces(_other(word | {"vocab": {"<unk>": 0, "a": 1, "##b": 2}})) is None


@pytest.mark.parametrize(
    "argv, told",
    [
        (["extend"], "-c"),
        (["extend", "-c", "nowhere"], "no shipped tokenizer"),
        (["extend", "-c", "cabrita-p"], "'cabrita-pt'"),
        (["extend", "-c", "cabrita-pt", "tokenz=3"], "'tokens'"),
        (["extend", "-c", "cabrita-pt", "tokens=-3"], "tokens=-3"),
        (["extend", "-c", "cabrita-pt", "name=../x"], "plain folder name"),
        (["extend", "-c", "cabrita-pt", "train=[]"], "train is empty"),
        (["extend", "-c", "cabrita-pt", "workers=0"], "workers=0"),
        (["extend", "-c", "cabrita-pt", "sweep=[4000]"], "between 0 and tokens=4000"),
        (["extend", "-c", "cabrita-pt", "eval=[]"], "held-out texts"),
        (["extend", "-c", "cabrita-pt", "method={name: append, fresh_tokens: 0}"], "fresh_tokens=0"),
        (["extend", "-c", "cabrita-pt", "method={name: continued_bpe, max_token_bytes: 1}"], "max_token_bytes=1"),
        (["extend", "-c", "cabrita-pt", "--json"], "--json"),
        (["extend", "-c", "adapt/configs/dap.yaml"], "recipe of a run"),
        (["report", "--text", "x"], "at least one tokenizer"),
        (["report", "a"], "--text"),
        (["report", "a", "-c", "x"], "-c"),
        (["report", "./nowhere", "--text", "nowhere.txt"], "nowhere.txt"),
        (["shrink"], "invalid choice"),
    ],
)
def test_mistakes_are_letters(argv, told, capsys):
    assert main(["tokenizer", *argv]) == 2
    assert told in capsys.readouterr().err


def test_records_that_cannot_be_read_are_told(recipe_file, tmp_path):
    records = [json.dumps({"text": line}).encode() for line in PORTUGUESE.splitlines()]
    (tmp_path / "texts.jsonl").write_bytes(b"\n".join([*records, b"{", b'{"text": "\xff"}']))
    done = extend(load(recipe_file, [f"train.0.source=path:{tmp_path / 'texts.jsonl'}", "tokens=20"]))
    assert done.num_tokens == 20
    assert "2 records could not be read" in done.warnings[0]
    (tmp_path / "latin.txt").write_bytes("não".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        extend(load(recipe_file, [f"train.0.source=path:{tmp_path / 'latin.txt'}"]))


def test_shipped_tokenizers_are_read():
    assert "cabrita-pt" in shipped_tokenizers()
    for name in shipped_tokenizers():
        assert load(name, []).name == name


@pytest.mark.parametrize("name", shipped_tokenizers())
def test_a_shipped_recipe_runs_on_small_texts(recipe_file, tmp_path, name):
    changes = [f"base={tmp_path / 'base'}", f"dir={tmp_path}", "tokens=30", "sweep=[10]", "workers=1"]
    changes += [f"train=[{{source: 'path:{tmp_path / 'pt.txt'}'}}]"]
    changes += [f"eval.{i}.source=path:{tmp_path / n}.txt" for i, n in enumerate(("held", "en"))]
    done = extend(load(name, changes))
    assert done.num_tokens == 30
    assert done.changes["english"].changed_rate < done.changes["portuguese"].changed_rate


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from adapt.cli import main; main(['tokenizer', '--help']); "
        "from adapt.tokenization.recipe import load; load('cabrita-pt', []); "
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
