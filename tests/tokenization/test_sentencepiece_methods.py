"""Unigram, and the merges of Cabrita and Chinese-LLaMA."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt.errors import UserError
from adapt.tokenization import proofs, sentencepiece_proofs
from adapt.tokenization.extend import extend
from adapt.tokenization.methods.cabrita import Merge, MergeConfig
from adapt.tokenization.methods.unigram import Unigram, UnigramConfig
from adapt.tokenization.recipe import load
from adapt.tokenization.sentencepiece_fresh import flags, trained
from adapt.tokenization.sentencepiece_unigram import best_split, raised
from tests.tokenization.byte_level import ENGLISH, PORTUGUESE
from tests.tokenization.piece_models import base, folder_of, words

UNIGRAM_STYLES = ("llama", "no_bytes", "no_prefix", "user")


@pytest.fixture(autouse=True)
def _no_other_process(monkeypatch):
    monkeypatch.setattr(proofs, "reloaded_elsewhere", lambda *args: [])
    monkeypatch.setattr(sentencepiece_proofs, "model_elsewhere", lambda *args: [])


def unigram(style: str, num_tokens: int = 40, fresh: int = 120):
    old = base(style, "unigram")
    return old, Unigram(UnigramConfig(fresh_tokens=fresh))(old, words(old), num_tokens)


@pytest.mark.parametrize("style", UNIGRAM_STYLES)
def test_new_unigram_pieces_are_reached_and_both_files_agree(style):
    old, found = unigram(style)
    new = old.grown(found)
    assert len(found.tokens) == 40
    assert sentencepiece_proofs.pieces_kept(old, new) == []
    assert new.unreachable(found.tokens) == []
    lines = sentencepiece_proofs.lines_of(old, [PORTUGUESE, ENGLISH])
    assert sentencepiece_proofs.both_alike(new, lines) == []
    size = [len(model.processor().encode(PORTUGUESE)) for model in (old, new)]
    assert size[1] < size[0]


def test_unigram_pieces_are_the_most_probable_of_a_model_of_the_new_texts():
    old, found = unigram("llama")
    fresh = dict(trained(words(old), "unigram", 120, **flags(old)))
    missing = sorted((p for p in fresh if p not in old.vocab), key=lambda p: (-fresh[p], p))
    assert found.tokens == missing[:40]
    assert all(score >= fresh[p] - 1e-6 for p, score in zip(found.tokens, found.scores, strict=True))
    assert all(old.rules.allows(p) for p in found.tokens if len(p) > 1)


def test_the_same_words_in_any_order_give_the_same_pieces():
    old = base("llama", "unigram")
    counted = words(old)
    method = Unigram(UnigramConfig(fresh_tokens=120))
    assert method(old, dict(sorted(counted.items(), reverse=True)), 40) == method(old, counted, 40)
    other = base("llama")
    merge = Merge(MergeConfig(fresh_tokens=120), None)
    assert merge(other, dict(sorted(counted.items(), reverse=True)), 20) == merge(other, counted, 20)


SCORES = st.dictionaries(st.text(st.sampled_from("abc"), min_size=1, max_size=5), st.floats(-20, -1), max_size=10)


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("abc"), min_size=2, max_size=6), SCORES)
def test_the_best_split_is_the_best_of_all(piece, scores):
    ways = []
    for cuts in itertools.product([False, True], repeat=len(piece) - 1):
        parts, start = [], 0
        for end in [i + 1 for i, cut in enumerate(cuts) if cut] + [len(piece)]:
            parts.append(piece[start:end])
            start = end
        if len(parts) > 1 and all(p in scores or len(p) == 1 for p in parts):
            ways.append(sum(scores.get(p, -30.0) for p in parts))
    assert best_split(piece, scores, -30.0, 6) == pytest.approx(max(ways))


@settings(max_examples=60, deadline=None)
@given(SCORES, SCORES)
def test_raised_scores_make_every_new_piece_the_best_way_to_write_it(old, new):
    old = {"a": -5.0, "b": -5.5, "c": -6.0} | old
    new = {p: s for p, s in new.items() if p not in old}
    found = raised(old, new)
    everything = old | found
    assert all(found[p] >= new[p] for p in new)
    for piece in (p for p in new if len(p) > 1):
        assert found[piece] > best_split(piece, everything, -100.0, 5)
    assert {p: s for p, s in found.items() if s != new[p]}.keys() <= {p for p in new if len(p) > 1}


@pytest.mark.parametrize("method, score", [("cabrita", None), ("chinese_llama", 0.0)])
def test_a_merge_appends_what_the_base_lacks(method, score):
    old = base("llama")
    counted = words(old)
    found = Merge(MergeConfig(fresh_tokens=100), score)(old, counted, 30)
    fresh = trained(counted, "bpe", 100)
    missing = [(p, s) for p, s in fresh if p not in old.taken][:30]
    assert found.tokens == [p for p, _ in missing]
    assert found.scores == [s if score is None else score for _, s in missing]


def recipe_of(tmp_path, style: str, kind: str, method: str) -> str:
    folder_of(style, tmp_path / "base", kind)
    for name, text in (("pt", PORTUGUESE), ("en", ENGLISH)):
        (tmp_path / f"{name}.txt").write_text(text)
    data = {
        "name": "small",
        "dir": str(tmp_path / "built"),
        "base": str(tmp_path / "base"),
        "tokens": 40,
        "method": {"name": method, "fresh_tokens": 120},
        "train": [{"source": f"path:{tmp_path / 'pt.txt'}"}],
        "eval": [{"source": f"path:{tmp_path / n}.txt", "name": n} for n in ("pt", "en")],
        "workers": 1,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(data))
    return str(tmp_path / "recipe.yaml")


def test_a_unigram_folder_is_extended_and_what_changed_is_told(tmp_path):
    done = extend(load(recipe_of(tmp_path, "no_bytes", "unigram", "unigram"), []))
    assert not any(done.proofs.values())
    assert not any("boundaries" in claim for claim in done.proofs)  # which Unigram does not promise
    assert any("same ids" in claim for claim in done.proofs)
    assert done.changes["pt"].changed_rate > 0
    again = extend(load(str(tmp_path / "recipe.yaml"), [f"base={done.out}", "name=more", "tokens=3"]))
    assert again.num_tokens == 3


@pytest.mark.parametrize("method", ["cabrita", "chinese_llama"])
def test_merges_promise_nothing_and_their_faults_are_told(tmp_path, method):
    done = extend(load(recipe_of(tmp_path, "llama", "bpe", method), ["tokens=60"]))
    assert done.num_tokens > 20
    assert not any(done.proofs.values())
    assert not any("reached" in claim or "boundaries" in claim for claim in done.proofs)
    told = " ".join(done.warnings)
    assert "give other ids on" in told or "are reached by no text" in told or "no longer reached" in told


def test_a_merged_tokenizer_is_extended_further(tmp_path):
    """Its scores are not distinct, and its two files disagree: continued BPE keeps its promises all the same."""
    merged = extend(load(recipe_of(tmp_path, "llama", "bpe", "cabrita"), ["tokens=30"]))
    assert any("give other ids" in warning for warning in merged.warnings)
    again = [f"base={merged.out}", "name=more", "tokens=20", "method=continued_bpe"]
    done = extend(load(str(tmp_path / "recipe.yaml"), again))
    assert done.num_tokens == 20
    assert not any(done.proofs.values())
    assert any("disagree on" in claim for claim in done.proofs)


def test_a_model_too_large_for_the_texts_is_a_letter(tmp_path):
    with pytest.raises(UserError, match="sentencepiece cannot train a bpe model of 3 pieces"):
        extend(load(recipe_of(tmp_path, "llama", "bpe", "cabrita"), ["method.fresh_tokens=3"]))
