"""`adapt tokenizer prune`, whole: folders in, folders out, proofs, letters."""

from __future__ import annotations

import json

import pytest

from adapt.cli import main
from adapt.errors import UserError
from adapt.tokenization import proofs, prune_proofs
from adapt.tokenization.byte_bpe import ByteBpe
from adapt.tokenization.extend import extend
from adapt.tokenization.folder import CONFIG, MARKER
from adapt.tokenization.prune import prune
from adapt.tokenization.recipe import PruneRecipe, load, shipped_tokenizers
from tests.tiny import CHAT_TEMPLATE
from tests.tokenization.byte_level import ENGLISH, PORTUGUESE, SPECIALS, STYLES, base
from tests.tokenization.test_extend import elsewhere, folder_of

SOME = "the quick brown dog is in the documentation of another model\n"


@pytest.fixture(autouse=True)
def _no_other_process(monkeypatch):
    """Starting one takes seconds; the tests that are about it say so."""
    monkeypatch.setattr(proofs, "reloaded_elsewhere", lambda *args: [])


@pytest.fixture
def recipe_file(tmp_path):
    """A recipe on a SmolLM2-like tokenizer; keys are overridden."""
    folder_of("smollm2", tmp_path / "base")
    for name, text in (("some", SOME), ("en", ENGLISH), ("pt", PORTUGUESE), ("empty", "  \n")):
        (tmp_path / f"{name}.txt").write_text(text)
    data = {
        "name": "small",
        "dir": str(tmp_path / "built"),
        "base": str(tmp_path / "base"),
        "train": [{"source": f"path:{tmp_path / 'some.txt'}"}],
        "eval": [{"source": f"path:{tmp_path / n}.txt", "name": n} for n in ("en", "pt")],
        "workers": 1,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(data))
    return str(tmp_path / "recipe.yaml")


def pruned(recipe_file, *changes):
    return prune(load(recipe_file, list(changes), PruneRecipe))


@pytest.mark.parametrize("style", STYLES)
def test_a_pruned_folder_loads_everywhere_with_the_same_ids(recipe_file, tmp_path, style, monkeypatch):
    from transformers import AutoTokenizer

    if style == "llama3":
        monkeypatch.setattr(proofs, "reloaded_elsewhere", elsewhere)
    source = folder_of(style, tmp_path / style)
    (source / "added_tokens.json").write_text(json.dumps({s: base(style).added[s] for s in SPECIALS}))
    fields = json.loads((source / CONFIG).read_text())
    decoder = {str(i): {"content": s, "special": True} for s, i in base(style).added.items()}  # as version 4 writes it
    (source / CONFIG).write_text(
        json.dumps(fields | {"added_tokens_decoder": decoder, "eos_token_id": base(style).added[SPECIALS[0]]})
    )
    done = pruned(recipe_file, f"base={source}")
    assert not any(done.proofs.values())
    assert len(done.proofs) == 6
    assert not done.warnings
    assert done.old_tokens == len(base(style).ids)
    assert done.num_tokens < done.old_tokens - 30
    old, new = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(done.out)
    raw = ByteBpe.read(done.out)
    assert len(new) == done.num_tokens == len(raw.ids) == raw.next_id
    assert new.chat_template == old.chat_template == CHAT_TEMPLATE
    assert new.special_tokens_map == old.special_tokens_map
    assert new.model_max_length == 77
    for text in (SOME, f"the dog{SPECIALS[0]}another"):
        assert new.tokenize(text) == old.tokenize(text)
        assert new(text)["input_ids"] == raw.tokenizer().encode(text).ids
        assert new.decode(new(text)["input_ids"]) == old.decode(old(text)["input_ids"])
    ids = {s: raw.added[s] for s in SPECIALS}
    assert {s: new.convert_tokens_to_ids(s) for s in SPECIALS} == ids
    if style != "smollm2":  # they lay behind the vocabulary, and still are the last
        assert sorted(ids.values()) == list(range(done.num_tokens - 3, done.num_tokens))
    stored = json.loads((done.out / CONFIG).read_text())
    assert {t["content"]: int(i) for i, t in stored["added_tokens_decoder"].items()} == ids
    assert stored["eos_token_id"] == ids[SPECIALS[0]]
    assert not (done.out / "added_tokens.json").exists()


def test_the_record_says_what_was_made_and_what_it_cost(recipe_file):
    done = pruned(recipe_file)
    record = json.loads((done.out / MARKER).read_text())
    assert (record["old_tokens"], record["tokens"]) == (len(base().ids), done.num_tokens)
    assert record["recipe"]["min_count"] == 1
    assert record["losses"]["pt"]["lines"] == done.losses["pt"].lines == 4
    assert 0 < done.losses["en"].changed <= done.losses["en"].lines
    fits = {(name, text): fit for name, text, fit in done.fits}
    assert fits["small", "pt"].tokens > fits["base", "pt"].tokens
    assert done.unused == sum(t not in used(SOME) for t in ByteBpe.read(done.out).ids)


def used(text: str) -> set[str]:
    names = {i: token for token, i in base().ids.items()}
    return {names[i] for i in base().tokenizer().encode(text).ids}


def test_strict_keeps_more_and_promises_more(recipe_file):
    done, strict = pruned(recipe_file), pruned(recipe_file, "strict=true", "name=strict")
    assert done.num_tokens < strict.num_tokens < strict.old_tokens
    assert set(strict.proofs) - set(done.proofs) >= {
        "boundaries between tokens are only added, so that no text has fewer tokens"
    }
    assert {one.fewer for one in strict.losses.values()} == {0}


def test_a_size_a_count_and_what_to_keep(recipe_file):
    every = pruned(recipe_file)
    fewer = pruned(recipe_file, f"tokens={every.num_tokens - 5}")
    assert every.num_tokens - 20 < fewer.num_tokens <= every.num_tokens - 5
    assert pruned(recipe_file, "min_count=2").num_tokens < every.num_tokens
    gone = sorted(base().ids.keys() - ByteBpe.read(every.out).ids.keys())[-1]
    kept = pruned(recipe_file, f"keep=[{json.dumps(gone)}]", "name=kept")
    assert gone in ByteBpe.read(kept.out).ids
    unlimited = pruned(recipe_file, f"tokens={every.num_tokens + 5}")
    assert unlimited.num_tokens == every.num_tokens
    assert "sets no limit" in unlimited.warnings[0]


def test_pruned_then_extended(recipe_file, tmp_path):
    """A vocabulary for one language, whose room goes to another."""
    first = pruned(recipe_file)
    data = json.loads((tmp_path / "recipe.yaml").read_text()) | {"name": "both", "base": str(first.out), "tokens": 20}
    data["train"] = [{"source": f"path:{tmp_path / 'pt.txt'}"}]
    (tmp_path / "more.yaml").write_text(json.dumps(data))
    done = extend(load(str(tmp_path / "more.yaml"), []))
    assert not any(done.proofs.values())
    small, both = ByteBpe.read(first.out), ByteBpe.read(done.out)
    assert both.next_id == len(both.ids) == first.num_tokens + 20
    assert all(both.ids[token] == i for token, i in small.ids.items())
    assert both.merges[: len(small.merges)] == small.merges
    fits = {(name, text): fit for name, text, fit in done.fits}
    assert fits["both", "pt"].tokens < fits["base", "pt"].tokens
    again = pruned(str(tmp_path / "recipe.yaml"), f"base={done.out}", "name=again")  # and back
    assert ByteBpe.read(again.out).ids == small.ids


def test_a_built_tokenizer_is_replaced_and_a_foreign_folder_is_not(recipe_file, tmp_path):
    pruned(recipe_file)
    again = pruned(recipe_file, "min_count=2")
    assert [p.name for p in again.out.parent.iterdir()] == ["small"]
    with pytest.raises(UserError, match="was not made by"):
        pruned(recipe_file, f"dir={tmp_path}", "name=base")


def test_nothing_to_prune_is_told(recipe_file, tmp_path):
    with pytest.raises(UserError, match=r"min_count: there is nothing to prune: each of the 340 tokens"):
        pruned(recipe_file, f"train.0.source=path:{tmp_path / 'en.txt'}")


@pytest.mark.parametrize(
    "changes, told",
    [
        (["train.0.source=path:{}/empty.txt"], "no text in it after cleaning"),
        (["eval.0.source=path:{}/empty.txt"], "en: there is no text in it"),
        (["keep=[' the', 'xyzzy']"], r"keep\[1\]: 'xyzzy' is no token of the base, but 5: x y z z y"),
        (["tokens=340"], "tokens: 340 are no fewer than the 340 there are"),
        (["tokens=5000"], "tokens: 5,000 are no fewer"),
        (["tokens=100"], "tokens: 100 is too few: 259 are kept always"),
        (["tokens=0"], "tokens=0 must be 1 or more"),
        (["min_count=0"], "min_count=0 must be 1"),
        (["name=../x"], "plain folder name"),
        (["method=continued_bpe"], "method"),
        (["base={}/none"], "base"),
    ],
)
def test_mistakes_are_letters(recipe_file, tmp_path, changes, told):
    with pytest.raises(UserError, match=told):
        pruned(recipe_file, *(change.format(tmp_path) for change in changes))
    assert not (tmp_path / "built" / "small").exists()


def test_all_problems_are_told_at_once(recipe_file, tmp_path):
    changes = ["keep=[xyzzy]", "train.0.source=path:nowhere", "eval.1.name=en", f"dir={tmp_path}", "name=base"]
    with pytest.raises(UserError) as refused:
        pruned(recipe_file, *changes)
    assert {p.where for p in refused.value.problems} == {"keep[0]", "train[0].source", "eval", "dir"}


@pytest.mark.parametrize(
    "model, told",
    [
        ({"type": "WordPiece", "vocab": {"a": 0}}, "its model is WordPiece"),
        ({"type": "Unigram", "vocab": [["a", 0.0]]}, "its model is Unigram"),
        ({"type": "BPE", "vocab": {"a": 0}, "merges": [], "byte_fallback": True}, "its model is SentencePiece BPE"),
        ({"type": "BPE", "vocab": {"a": 0}, "merges": []}, "BPE over characters"),
        (None, "has a SentencePiece model; only byte-level"),
    ],
)
def test_other_kinds_are_refused_by_name(recipe_file, tmp_path, model, told):
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.model").touch()
    if model:
        (other / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(UserError, match=told):
        pruned(recipe_file, f"base={other}")


def test_a_broken_promise_is_not_written(recipe_file, monkeypatch):
    monkeypatch.setattr(prune_proofs, "reached_as_before", lambda old, new: ["'the'"])
    with pytest.raises(UserError, match="not so: kept tokens are reached as before: 'the'"):
        pruned(recipe_file)
    assert not list(load(recipe_file, [], PruneRecipe).out.parent.iterdir())


def test_special_tokens_that_changed_are_found(recipe_file, tmp_path):
    done = pruned(recipe_file)
    assert prune_proofs.specials_unchanged(tmp_path / "base", done.out) == []
    fields = json.loads((done.out / CONFIG).read_text())
    (done.out / CONFIG).write_text(json.dumps(fields | {"eos_token": SPECIALS[1], "model_max_length": 5}))
    found = prune_proofs.specials_unchanged(tmp_path / "base", done.out)
    assert [what.partition(":")[0] for what in found] == ["special tokens", "model_max_length"]


def test_without_held_out_text_the_proofs_run_over_what_was_counted(recipe_file):
    done = pruned(recipe_file, "eval=[]")
    assert any(claim.startswith("1 texts come back") for claim in done.proofs)
    assert done.fits == []


def test_the_command(recipe_file, tmp_path, capsys):
    assert main(["tokenizer", "prune", "-c", recipe_file, "min_count=2"]) == 0
    out = capsys.readouterr().out
    assert out.count("✓") == 6
    assert "of 340 tokens are left" in out
    assert "pt: 100.0% of 4 lines have other tokens" in out
    assert main(["tokenizer", "report", str(tmp_path / "built" / "small"), "--text", str(tmp_path / "en.txt")]) == 0
    assert "unreachable: 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, told",
    [
        (["prune"], "smollm2-english"),
        (["prune", "-c", "smollm2-englis"], "'smollm2-english'"),
        (["prune", "-c", "cabrita-pt"], "is a recipe for `adapt tokenizer extend`, not for `prune`"),
        (["extend", "-c", "smollm2-english"], "is a recipe for `adapt tokenizer prune`, not for `extend`"),
        (["prune", "-c", "smollm2-english", "min_cont=3"], "'min_count'"),
        (["prune", "-c", "smollm2-english", "--json"], "--json"),
    ],
)
def test_commands_that_cannot_be_meant(argv, told, capsys):
    assert main(["tokenizer", *argv]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", shipped_tokenizers(PruneRecipe))
def test_a_shipped_recipe_runs_on_small_texts(recipe_file, tmp_path, name):
    changes = [f"base={tmp_path / 'base'}", f"dir={tmp_path}", "workers=1"]
    changes += [f"train=[{{source: 'path:{tmp_path / 'some.txt'}'}}]"]
    changes += [f"eval.{i}.source=path:{tmp_path / n}.txt" for i, n in enumerate(("en", "pt"))]
    done = pruned(name, *changes)
    assert done.out.name == name
    assert done.num_tokens < done.old_tokens
